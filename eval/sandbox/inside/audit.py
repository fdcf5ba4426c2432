"""An audit hook (PEP 578) that refuses actions that a function for a docstring does not need.

It guards against accidents: a wrong path, a deleted file, a request sent to somewhere. It is in Python, inside the
process that it watches, and code that is written to get around it will. Against that there is the kernel.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from typing import Any

# Of these kinds of events none is let through, but for those in _HARMLESS and those with a rule of their own.
_KINDS = ("os", "socket", "subprocess", "ctypes", "ftplib", "http", "urllib", "smtplib", "poplib", "imaplib", "nntplib",
          "telnetlib", "pty", "webbrowser", "ensurepip", "winreg", "syslog")  # fmt: skip
_REFUSED = ("signal.pthread_kill", "resource.prlimit", "sqlite3.enable_load_extension", "sqlite3.load_extension",
            "_winapi.CreateProcess", "_winapi.OpenProcess", "_winapi.TerminateProcess")  # fmt: skip
_HARMLESS = ("os.putenv", "os.unsetenv", "os.lockf", "os.walk", "os.fwalk", "os.listdrives", "socket.gethostname",
             "winreg.OpenKey", "winreg.EnumKey", "winreg.QueryValue", "winreg.OpenKey/result",
             "winreg.ConnectRegistry")  # fmt: skip
# Functions without an event.
_WITHDRAWN = (
    ("os", "mkfifo mknod memfd_create nice setpriority sched_setaffinity sched_setscheduler sched_setparam setsid "
           "setpgid setuid seteuid setgid setegid setgroups unshare setns pidfd_open openpty posix_openpt"),
    ("_posixsubprocess", "fork_exec"),
    ("_posixshmem", "shm_open shm_unlink"),
)  # fmt: skip


def install(home: str, readable: Sequence[str], listable: Sequence[str]) -> None:
    """Files in `home` may be read and written, files that are or lie in `readable` read, `listable` listed."""
    for module, names in _WITHDRAWN:
        _withdraw(module, names.split())
    # rmtree and others use it where it is there. An event does not say of which directory a path counts.
    os.supports_dir_fd.clear()
    sys.addaudithook(_hook(home, readable, listable))


def _withdraw(module: str, names: Sequence[str]) -> None:
    def refuse(*arguments: Any, **named: Any) -> Any:
        raise PermissionError(f"{module}: not allowed here")

    try:
        modules = [__import__(module), *([__import__(os.name)] if module == "os" else [])]
    except ImportError:
        return
    for each in modules:
        for name in names:
            if hasattr(each, name):
                setattr(each, name, refuse)


def _hook(home: str, readable: Sequence[str], listable: Sequence[str]) -> Callable[[str, tuple[Any, ...]], None]:
    # Names are bound here: the program may replace what it finds in modules, builtins included.
    cwd, decode, sep, windows = os.getcwd, sys.getfilesystemencoding(), os.sep, os.name == "nt"
    isinstance_, text, raw, number, error = isinstance, str, bytes, int, PermissionError
    changes = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
    unix, memory = 1, (":memory:", "")  # AF_UNIX; databases without a file
    kinds, refused, harmless = frozenset(_KINDS), frozenset(_REFUSED), frozenset(_HARMLESS)
    whole, below, lists = frozenset(readable), tuple(place + sep for place in readable), frozenset(listable)
    directory = os.path.isdir

    def absolute(path: Any) -> str:
        """Without symbolic links: the program cannot make any."""
        if not isinstance_(path, (text, raw)):
            path = path.__fspath__()
        if isinstance_(path, raw):
            path = path.decode(decode, "surrogateescape")
        if windows:
            path = path.replace("/", sep)
        rooted = path.startswith(sep) or (windows and path[1:2] == ":")
        parts: list[str] = []
        for part in (path if rooted else cwd() + sep + path).split(sep):
            if part == "..":
                parts = parts[:-1]
            elif part not in ("", "."):
                parts.append(part)
        return ("" if windows else sep) + sep.join(parts)

    def at_home(path: Any) -> bool:
        place = absolute(path)
        return place == home or place.startswith(home + sep)

    def may_read(path: Any) -> bool:
        place = absolute(path)
        return place in whole or place.startswith(below)

    def opening(path: Any, mode: Any, flags: int) -> bool:
        if isinstance_(path, number) or at_home(path):
            return True
        # A directory that is open could be one that other calls count from.
        return not flags & changes and may_read(path) and (mode is not None or not directory(path))

    def listing(path: Any = None) -> bool:
        return path is None or isinstance_(path, number) or at_home(path) or may_read(path) or absolute(path) in lists

    def changing(path: Any, *more: Any) -> bool:
        """more: further values of the event; the last is the open directory of a relative path, -1 for none."""
        return not isinstance_(path, number) and at_home(path) and more[-1] == -1

    rules: dict[str, Callable[..., bool]] = {
        "open": opening,
        "os.listdir": listing,
        "os.scandir": listing,
        "os.chdir": lambda path: not isinstance_(path, number) and at_home(path),
        "os.mkdir": changing,
        "os.remove": changing,
        "os.rmdir": changing,
        "os.rename": lambda a, b, from_, to: changing(a, from_) and changing(b, to),
        "os.truncate": lambda path, length: isinstance_(path, number) or at_home(path),
        "socket.__new__": lambda made, family, kind, protocol: family == unix,  # pairs, for asyncio
        "ctypes.dlopen": lambda name: name is None,  # by `import ctypes` itself
        "sqlite3.connect": lambda name: name in memory or at_home(name),
        "sqlite3.connect/handle": lambda made: True,
    }
    rule_of = rules.get

    def guard(event: str, arguments: tuple[Any, ...]) -> None:
        rule = rule_of(event)
        if rule is not None:
            if not rule(*arguments):
                raise error(event)
        elif event in refused or (event.partition(".")[0] in kinds and event not in harmless):
            raise error(event)

    return guard
