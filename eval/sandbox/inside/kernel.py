"""Gives up rights as far as an unprivileged Linux process can: namespaces, Landlock, system calls.

Runs in the process that is to be confined, through the C library. Each function raises OSError where the kernel, or a
container around this process, does not let it. Sources: man 7 user_namespaces, man 7 landlock (and linux/landlock.h),
man 2 seccomp, man 2 capset.
"""

from __future__ import annotations

import ctypes
import errno
import os
import struct
from collections.abc import Sequence

from .syscalls import program

_LIBC = ctypes.CDLL(None, use_errno=True)
_CAPSET = {"x86_64": 126, "aarch64": 91}
_LANDLOCK_CREATE, _LANDLOCK_ADD, _LANDLOCK_RESTRICT = 444, 445, 446  # the same on every machine
HOME_BYTES, HOME_FILES = 16 << 20, 4096  # of the temporary directory, where it is a file system of its own


def _call(name: str, *arguments: object) -> int:
    """A function of the C library; raises OSError where it fails."""
    wide = [ctypes.c_long(each) if isinstance(each, int) else each for each in arguments]
    result = int(getattr(_LIBC, name)(*wide))
    if result == -1:
        number = ctypes.get_errno()
        raise OSError(number, f"{name}: {os.strerror(number)}")
    return result


def die_with_parent() -> None:
    _call("prctl", 1, 9)  # PR_SET_PDEATHSIG, SIGKILL


def give_up_privileges() -> None:
    """No new ones by set-user-ID programs, and none of root's."""
    _call("prctl", 38, 1, 0, 0, 0)  # PR_SET_NO_NEW_PRIVS
    if (number := _CAPSET.get(os.uname().machine)) is not None:
        header, none = struct.pack("=Ii", 0x20080522, 0), bytes(24)  # _LINUX_CAPABILITY_VERSION_3
        _call("syscall", number, header, none)


def new_namespaces(home: str) -> None:
    """No network, no System V memory of others, and a small file system in memory in place of `home`."""
    uid, gid = os.getuid(), os.getgid()
    _call("unshare", 0x10000000 | 0x00020000 | 0x40000000 | 0x08000000)  # CLONE_NEWUSER, _NEWNS, _NEWNET, _NEWIPC
    for name, text in (("setgroups", "deny"), ("uid_map", f"{uid} {uid} 1"), ("gid_map", f"{gid} {gid} 1")):
        with open(f"/proc/self/{name}", "w", encoding="ascii") as file:
            file.write(text)
    options = f"size={HOME_BYTES},nr_inodes={HOME_FILES},mode=0700".encode()
    _call("mount", b"box", os.fsencode(home), b"tmpfs", 2 | 4 | 8, options)  # MS_NOSUID, MS_NODEV, MS_NOEXEC
    os.chdir(home)


# Rights to files, in the order of their bits.
_EXECUTE, _WRITE, _READ, _LIST, _REMOVE_DIR, _REMOVE_FILE, _MAKE_CHAR, _MAKE_DIR, _MAKE_FILE = (
    1 << bit for bit in range(9)
)
_REFER, _TRUNCATE = 1 << 13, 1 << 14  # to move between directories; since versions 2 and 3
_HOME = _WRITE | _READ | _LIST | _REMOVE_DIR | _REMOVE_FILE | _MAKE_DIR | _MAKE_FILE | _REFER | _TRUNCATE


def landlock(home: str, readable: Sequence[str], listable: Sequence[str]) -> None:
    """Files: `home` may be written, `readable` (files, or directories with all in them) read, `listable` listed."""
    version = _call("syscall", _LANDLOCK_CREATE, None, 0, 1)  # LANDLOCK_CREATE_RULESET_VERSION
    n_rights = 13 if version == 1 else 14 if version == 2 else 15 if version < 5 else 16
    handled = (1 << n_rights) - 1
    # Since version 4 also TCP (bind, connect), since 6 abstract sockets and signals to processes outside.
    attributes = struct.pack("=QQQ", handled, 3, 3)[: 8 if version < 4 else 16 if version < 6 else 24]
    rules = _call("syscall", _LANDLOCK_CREATE, attributes, len(attributes), 0)
    try:
        _allow(rules, home, _HOME & handled)
        for paths, rights in ((readable, _READ | _LIST), (listable, _LIST)):
            for path in paths:
                _allow(rules, path, rights)
        _allow(rules, os.devnull, _READ | _WRITE)
        _call("syscall", _LANDLOCK_RESTRICT, rules, 0)
    finally:
        os.close(rules)


def _allow(rules: int, path: str, rights: int) -> None:
    try:
        place = os.open(path, os.O_PATH | os.O_CLOEXEC)
    except OSError:
        return  # is not there
    try:
        if not os.path.isdir(path):
            rights &= _READ | _WRITE
        _call("syscall", _LANDLOCK_ADD, rules, 1, struct.pack("=Qi", rights, place), 0)  # LANDLOCK_RULE_PATH_BENEATH
    finally:
        os.close(place)


def filter_calls(read_only: bool) -> None:
    """Only the system calls of syscalls.py from here on, in this thread and those it starts."""
    filter_ = program(os.uname().machine, read_only=read_only)
    if filter_ is None:
        raise OSError(errno.ENOSYS, "seccomp: this machine's system calls are not known")
    held = ctypes.create_string_buffer(filter_, len(filter_))
    fprog = struct.pack("@HP", len(filter_) // 8, ctypes.addressof(held))  # struct sock_fprog
    _call("prctl", 22, 2, fprog)  # PR_SET_SECCOMP, SECCOMP_MODE_FILTER
