"""A seccomp filter: the system calls that a Python program without processes, network and devices needs.

It is a list of what is allowed; everything else gives ENOSYS, so that the C library falls back to an older call where
it knows one. Numbers are those of the kernel's headers (asm/unistd_64.h; asm-generic/unistd.h for aarch64). Layout of
the program: linux/filter.h, linux/seccomp.h; order of the arguments: man 2 of each call.
"""

from __future__ import annotations

import errno
import os
import struct
import sys
from collections.abc import Mapping, Sequence

# machine -> AUDIT_ARCH (linux/audit.h), and the column of its numbers below
_MACHINES = {"x86_64": (0xC000003E, 1), "aarch64": (0xC00000B7, 2)}

# call, its number on x86_64, its number on aarch64; "-" where there is none
_READING = """
read 0 63, readv 19 65, pread64 17 67, lseek 8 62, close 3 57, close_range 436 436, dup 32 23, dup2 33 -, dup3 292 24,
stat 4 -, lstat 6 -, fstat 5 80, newfstatat 262 79, statx 332 291, statfs 137 43, fstatfs 138 44, access 21 -,
faccessat 269 48, faccessat2 439 439, readlink 89 -, readlinkat 267 78, getdents64 217 61, getcwd 79 17, chdir 80 49,
fchdir 81 50, fadvise64 221 223, umask 95 166, flock 73 32
"""
_WRITING = """
write 1 64, writev 20 66, pwrite64 18 68, ftruncate 77 46, fsync 74 82, fdatasync 75 83, sendfile 40 71
"""
_CHANGING = """
mkdir 83 -, mkdirat 258 34, rmdir 84 -, unlink 87 -, unlinkat 263 35, rename 82 -, renameat 264 38, renameat2 316 276
"""
_MEMORY = "mmap 9 222, mprotect 10 226, munmap 11 215, mremap 25 216, madvise 28 233, brk 12 214, msync 26 227"
_WAITING = """
pipe 22 -, pipe2 293 59, poll 7 -, ppoll 271 73, select 23 -, pselect6 270 72, epoll_create1 291 20, epoll_ctl 233 21,
epoll_wait 232 -, epoll_pwait 281 22, eventfd2 290 19, recvfrom 45 207, sendmsg 46 211, recvmsg 47 212,
shutdown 48 210, getsockopt 55 209, getsockname 51 204, getpeername 52 205
"""
_SIGNALS_AND_TIME = """
rt_sigaction 13 134, rt_sigprocmask 14 135, rt_sigreturn 15 139, rt_sigtimedwait 128 137, rt_sigpending 127 136,
sigaltstack 131 132, pause 34 -, alarm 37 -, setitimer 38 103, getitimer 36 102, restart_syscall 219 128,
clock_gettime 228 113, clock_getres 229 114, clock_nanosleep 230 115, nanosleep 35 101, gettimeofday 96 169,
time 201 -, times 100 153
"""
_SELF = """
exit 60 93, exit_group 231 94, wait4 61 260, futex 202 98, set_tid_address 218 96, set_robust_list 273 99,
rseq 334 293, sched_yield 24 124, sched_getaffinity 204 123, getcpu 309 168, membarrier 324 283, getpid 39 172,
gettid 186 178, getppid 110 173, getuid 102 174, geteuid 107 175, getgid 104 176, getegid 108 177, getresuid 118 148,
getresgid 120 150, getgroups 115 158, getpgid 121 155, getpgrp 111 -, getsid 124 156, uname 63 160, sysinfo 99 179,
getrusage 98 165, getrlimit 97 163, getrandom 318 278
"""
_ON_CONDITION = """
open 2 -, openat 257 56, fcntl 72 25, ioctl 16 29, clone 56 220, prctl 157 167, prlimit64 302 261,
socketpair 53 199, sendto 44 206
"""

# (argument, mask, value): the lower half of the argument, masked, has this value
Test = tuple[int, int, int]

_ACCESS, _TMPFILE = 3, 0x400000  # O_ACCMODE; __O_TMPFILE, of the kernel's asm-generic/fcntl.h
_CLONE_THREAD = 0x10000
_AF_UNIX, _SOCK_STREAM, _SOCK_TYPE = 1, 1, 0xF
_PR_SET_NAME, _PR_GET_NAME = 15, 16
# F_DUPFD, F_GETFD, F_SETFD, F_GETFL, F_SETFL, F_GETLK, F_SETLK, F_SETLKW, F_OFD_*, F_DUPFD_CLOEXEC. F_SETOWN is not
# among them: it has the kernel send signals to any process of the user.
_FCNTL = (0, 1, 2, 3, 4, 5, 6, 7, 36, 37, 38, 1030)
_IOCTL = (0x5401, 0x5413, 0x541B, 0x5421, 0x5450, 0x5451)  # TCGETS, TIOCGWINSZ, FIONREAD, FIONBIO, FIONCLEX, FIOCLEX
_ANY = 0xFFFFFFFF


def _conditions(read_only: bool) -> Mapping[str, Sequence[Sequence[Test]]]:
    """For each call its alternatives: lists of tests that must all hold."""

    def opening(flags: int) -> Sequence[Sequence[Test]]:
        if read_only:
            return [[(flags, _ACCESS | os.O_CREAT | os.O_TRUNC | _TMPFILE, 0)]]
        # O_RDONLY | O_TRUNC empties a file that may only be read: Landlock knows of that since its third version only.
        return [[(flags, os.O_TRUNC, 0)], [(flags, _ACCESS, os.O_WRONLY)], [(flags, _ACCESS, os.O_RDWR)]]

    return {
        "open": opening(1),
        "openat": opening(2),
        "fcntl": [[(1, _ANY, command)] for command in _FCNTL],
        "ioctl": [[(1, _ANY, request)] for request in _IOCTL],
        "clone": [[(0, _CLONE_THREAD, _CLONE_THREAD)]],  # threads, no processes
        "prctl": [[(0, _ANY, _PR_SET_NAME)], [(0, _ANY, _PR_GET_NAME)]],
        # prlimit64(0, which, NULL, old) reads its own limits. An argument below 0 is the upper half of an address.
        "prlimit64": [[(0, _ANY, 0), (2, _ANY, 0), (-2, _ANY, 0)]],
        # Datagrams could be sent to sockets of others, by an address given with them.
        "socketpair": [[(0, _ANY, _AF_UNIX), (1, _SOCK_TYPE, _SOCK_STREAM)]],
        "sendto": [[(4, _ANY, 0), (-4, _ANY, 0)]],
    }


def program(machine: str, *, read_only: bool) -> bytes | None:
    """The filter as an array of struct sock_filter; None for a machine whose numbers are not known.

    Args:
        machine: as os.uname() calls it.
        read_only: whether files may only be read, wherever they are.
    """
    if machine not in _MACHINES or sys.maxsize < 2**32 or sys.byteorder != "little":
        return None
    arch, column = _MACHINES[machine]
    groups = [_READING, _WRITING, _MEMORY, _WAITING, _SIGNALS_AND_TIME, _SELF, *([] if read_only else [_CHANGING])]
    steps = [_load(4), _jump_if(arch, 1, 0), _give(_KILL)]
    steps += [_load(0)]
    for number in (number for group in groups for number in _numbers(group, column).values()):
        steps += [_jump_if(number, 0, 1), _give(_ALLOW)]
    conditions = _conditions(read_only)
    for name, number in _numbers(_ON_CONDITION, column).items():
        block = _block(conditions[name])
        steps += [_jump_if(number, 0, len(block)), *block]
    return b"".join([*steps, _give(_ERROR | errno.ENOSYS)])


_ALLOW, _KILL, _ERROR = 0x7FFF0000, 0x80000000, 0x00050000  # SECCOMP_RET_ALLOW, _KILL_PROCESS, _ERRNO


def _numbers(group: str, column: int) -> dict[str, int]:
    rows = [row.split() for row in group.split(",")]
    return {row[0]: int(row[column]) for row in rows if row[column] != "-"}


def _block(alternatives: Sequence[Sequence[Test]]) -> list[bytes]:
    """Allows the call if an alternative holds, else refuses it."""
    block: list[bytes] = []
    for tests in alternatives:
        steps: list[bytes] = []
        for left, (argument, mask, value) in zip(range(len(tests), 0, -1), tests, strict=True):
            # What is left to skip where the test fails: three steps of each later test, and the step that allows.
            steps += [_load(_offset(argument)), _mask(mask), _jump_if(value, 0, 3 * (left - 1) + 1)]
        block += [*steps, _give(_ALLOW)]
    return [*block, _give(_ERROR | errno.EPERM)]


def _offset(argument: int) -> int:
    """Of the argument's lower half in struct seccomp_data; -n: the upper half of argument n."""
    return 16 + 8 * argument if argument >= 0 else 16 + 8 * -argument + 4


def _step(code: int, jt: int, jf: int, k: int) -> bytes:
    return struct.pack("=HBBI", code, jt, jf, k)


def _load(offset: int) -> bytes:
    return _step(0x20, 0, 0, offset)  # BPF_LD | BPF_W | BPF_ABS


def _mask(value: int) -> bytes:
    return _step(0x54, 0, 0, value)  # BPF_ALU | BPF_AND | BPF_K


def _jump_if(value: int, then: int, otherwise: int) -> bytes:
    return _step(0x15, then, otherwise, value)  # BPF_JMP | BPF_JEQ | BPF_K


def _give(result: int) -> bytes:
    return _step(0x06, 0, 0, result)  # BPF_RET | BPF_K
