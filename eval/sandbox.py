"""Runs Python that a model wrote, in a process of its own that cannot do much.

Isolated interpreter (-I -S), empty environment, a temporary directory, limits on processor time, memory, file size and
open files, a time limit after which the whole process group is killed, and an audit hook (PEP 578) that refuses files
outside the temporary directory, sockets, other processes and ctypes. Where the kernel lets users have namespaces
(Linux), also no network and no view of other processes. This stops accidents, which is what code from a language model
brings; it is no proof against code that was written to break out, hence --unsafe-code.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile

TIMEOUT = 10.0  # seconds
MEMORY = 1 << 30  # bytes of address space

# The first thing in the new process. Its standard input is a JSON object; it writes the token after the last line of
# the code has run, so that sys.exit(0) in the middle is no success.
_RUNNER = r"""
import json, os, sys
asked = json.load(sys.stdin)
out = os.dup(1)
null = os.open(os.devnull, os.O_RDWR)
for number in (0, 1, 2):
    os.dup2(null, number)
try:
    import resource
except ImportError:
    resource = None
if resource is not None:
    for name, most in asked["limits"].items():
        if hasattr(resource, name):
            resource.setrlimit(getattr(resource, name), (most, most))
import collections, functools, heapq, itertools, math, random, re, string, typing  # before files are out of reach
code = compile(asked["source"], "answer.py", "exec")
token, home = asked["token"], os.path.realpath(os.getcwd())
library = tuple(os.path.realpath(path) for path in sys.path if os.path.isdir(path))
refused = ("socket.", "subprocess.", "os.system", "os.exec", "os.fork", "os.posix_spawn", "os.spawn", "os.kill",
           "os.putenv", "ctypes.", "shutil.", "ftplib.", "http.", "urllib.", "smtplib.", "pty.", "signal.pthread_kill")
writing = ("os.remove", "os.rename", "os.rmdir", "os.mkdir", "os.chmod", "os.chown", "os.link", "os.symlink",
           "os.truncate", "os.utime", "os.chdir", "os.listdir", "os.scandir")
def guard(event, arguments, real=os.path.realpath, join=os.path.join, fs=os.fsdecode, read=os.O_RDONLY):
    if event.startswith(refused):
        raise PermissionError(event)
    if event == "open" or event in writing:
        for path in arguments[:2] if event in ("os.rename", "os.link", "os.symlink") else arguments[:1]:
            if isinstance(path, int) and event != "open":
                raise PermissionError(event)
            if isinstance(path, (str, bytes, os.PathLike)):
                place = real(fs(path))
                inside = place == home or place.startswith(home + os.sep)
                # Modules of the standard library may still be imported.
                reads = event == "open" and arguments[1] in ("r", "rb", None) and not arguments[2] & 3
                if not inside and not (reads and place.startswith(library)):
                    raise PermissionError(place)
sys.addaudithook(guard)
del guard, asked
exec(code, {"__name__": "answer"})
os.write(out, token.encode())
"""


def passes(source: str, *, timeout: float = TIMEOUT, memory: int = MEMORY) -> bool:
    """Whether a program runs to its end without an exception, within the limits.

    Args:
        source: Python.
        timeout: seconds, of processor and of wall-clock time.
        memory: bytes of address space.
    """
    token = secrets.token_hex(16)
    limits = {
        "RLIMIT_CPU": int(timeout) + 1,
        "RLIMIT_AS": memory,
        "RLIMIT_FSIZE": 1 << 20,
        "RLIMIT_NOFILE": 64,
        "RLIMIT_CORE": 0,
    }
    asked = json.dumps({"source": source, "token": token, "limits": limits})
    home = tempfile.mkdtemp(prefix="merge-eval-code-")
    try:
        with subprocess.Popen(
            [*_namespaces(), sys.executable, "-I", "-S", "-c", _RUNNER],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            cwd=home,
            env={"PATH": "/usr/bin:/bin", "LC_ALL": "C.UTF-8"},
            start_new_session=True,
        ) as process:
            try:
                written, _ = process.communicate(asked.encode(), timeout)
            except subprocess.TimeoutExpired:
                return False
            finally:
                if process.poll() is None:
                    with contextlib.suppress(ProcessLookupError):
                        os.killpg(process.pid, signal.SIGKILL)
        return written.endswith(token.encode())
    finally:
        shutil.rmtree(home, ignore_errors=True)


@functools.cache
def _namespaces() -> tuple[str, ...]:
    """The command in front that takes the network and other processes away; () where the kernel or the user may not."""
    unshare = shutil.which("unshare")
    if unshare is None:
        return ()
    command = (unshare, "--user", "--map-root-user", "--net", "--ipc", "--pid", "--fork", "--kill-child")
    try:
        done = subprocess.run([*command, "true"], capture_output=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return ()
    return command if done.returncode == 0 else ()
