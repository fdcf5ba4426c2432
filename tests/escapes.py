"""What code may try to get out of the sandbox: sent into it whole, where attempt() runs the functions of one kind.

    file_, process_          what Python offers
    rawfile_, rawprocess_    what no audit hook knows of: only the kernel can refuse it

Those on files get a directory of their own, outside, with a file `own` in it.
"""

# ruff: noqa: SIM115 - files are left open, as programs do that are not well written

import builtins
import contextlib
import ctypes
import fcntl
import os
import posixpath
import stat

_LIBC = ctypes.CDLL(None, use_errno=True)


def names(kind):
    return [name for name in globals() if name.startswith(kind + "_")]


def attempt(kind, place=None):
    """The names of those that succeeded."""
    done = []
    for name in names(kind):
        with contextlib.suppress(Exception):
            globals()[name](*([] if place is None else [f"{place}/{name}"]))
            done.append(name)
    return done


def _ok(result):
    if result < 0:
        raise OSError(ctypes.get_errno(), "refused")
    return result


def file_read(place):
    open(place + "/own").read()


def file_read_upwards(place):
    open("../" * 40 + place + "/own").read()


def file_write(place):
    open(place + "/own", "w")


def file_append(place):
    open(place + "/own", "ab")


def file_remove(place):
    os.remove(place + "/own")


def file_rename(place):
    os.rename(place + "/own", place + "/other")


def file_take(place):
    os.rename(place + "/own", "taken")


def file_truncate(place):
    os.truncate(place + "/own", 0)


def file_truncate_by_reading(place):
    os.open(place + "/own", os.O_RDONLY | os.O_TRUNC)


def file_make_directory(place):
    os.mkdir(place + "/made")


def file_make_directory_from_there(place):
    os.mkdir("made", dir_fd=os.open(place, os.O_RDONLY))


def file_make_fifo(place):
    os.mkfifo(place + "/made")


def file_make_node(place):
    os.mknod(place + "/made", stat.S_IFREG | 0o600)


def file_link(place):
    os.link(place + "/own", place + "/linked")


def file_symlink(place):
    os.symlink(place + "/own", "pointer")


def file_change_mode(place):
    os.chmod(place + "/own", 0o777)


def file_change_owner(place):
    os.chown(place + "/own", os.getuid(), os.getgid())


def file_change_times(place):
    os.utime(place + "/own", (1, 1))


def file_set_attribute(place):
    os.setxattr(place + "/own", "user.x", b"y")


def file_list_names(place):
    os.listdir(place)


def file_enter(place):
    home = os.getcwd()
    os.chdir(place)
    try:
        open("own").read()
    finally:
        os.chdir(home)


def file_make_database(place):
    import sqlite3

    sqlite3.connect(place + "/made").execute("create table a(b)")


def file_replace_names(place):
    home, saved = os.getcwd(), (os.getcwd, os.lstat, builtins.isinstance, dict(vars(posixpath)))
    for name in ("realpath", "join", "normpath", "abspath", "isabs"):
        setattr(posixpath, name, lambda *ignored: home)
    os.getcwd = os.lstat = lambda *ignored: home
    builtins.isinstance = lambda *ignored: False
    try:
        open(place + "/own").read()
    finally:
        os.getcwd, os.lstat, builtins.isinstance = saved[:3]
        vars(posixpath).update(saved[3])


# Of these no audit hook knows.


def rawfile_open(place):
    _ok(_LIBC.open((place + "/own").encode(), os.O_RDWR))


def rawfile_chmod(place):
    _ok(_LIBC.chmod((place + "/own").encode(), 0o777))


def rawfile_through_own_process(place):
    open("/proc/self/root" + place + "/own").read()


def rawfile_through_parent(place):
    open(f"/proc/{os.getppid()}/root{place}/own").read()


def process_fork():
    if os.fork() == 0:
        os._exit(0)


def process_run():
    import subprocess

    subprocess.run(["true"], check=True)


def process_spawn():
    os.posix_spawn("/bin/true", ["true"], {})


def process_fork_and_execute():
    import _posixsubprocess

    ends, one = os.pipe(), -1
    where = (one, one, one, one, one, one, *ends)
    how = (False, False, one, None, None, None, one, None, False)
    _posixsubprocess.fork_exec([b"x"], [b"/bin/true"], True, (ends[1],), None, None, *where, *how)


def process_multiprocess():
    import multiprocessing

    multiprocessing.get_context("fork").Process(target=print).start()


def process_signal():
    os.kill(os.getppid(), 0)


def process_limits_of_others():
    import resource

    resource.prlimit(os.getppid(), resource.RLIMIT_NOFILE)


def process_socket():
    import socket

    socket.socket()


def process_share_memory():
    import _posixshmem

    _posixshmem.shm_open("/merge-workbench-test", os.O_CREAT | os.O_RDWR, mode=0o600)
    _posixshmem.shm_unlink("/merge-workbench-test")


def rawprocess_fork():
    child = _ok(_LIBC.fork())
    if child == 0:
        os._exit(0)
    os.waitpid(child, 0)


def rawprocess_kill():
    _ok(_LIBC.kill(os.getppid(), 0))


def rawprocess_signal_when_ready():
    fcntl.fcntl(1, fcntl.F_SETOWN, os.getppid())


def rawprocess_socket():
    _ok(_LIBC.socket(2, 1, 0))


def rawprocess_datagrams():
    _ok(_LIBC.socketpair(1, 2, 0, (ctypes.c_int * 2)()))


def rawprocess_namespace():
    _ok(_LIBC.unshare(0x10000000))


def rawprocess_semaphore():
    _ok(_LIBC.semctl(_ok(_LIBC.semget(0, 1, 0o1600)), 0, 0))


def rawprocess_memory_file():
    _ok(_LIBC.memfd_create(b"x", 0))


# Last: whoever is traced stops at the next signal.
def rawprocess_trace():
    _ok(_LIBC.ptrace(0, 0, 0, 0))
