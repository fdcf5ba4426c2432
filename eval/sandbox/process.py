"""One confined process: starts it, reads its output, watches its limits, and ends it with its children."""

from __future__ import annotations

import contextlib
import itertools
import marshal
import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path

from eval.sandbox.launch import command, environment
from eval.sandbox.places import places
from eval.sandbox.removal import remove_tree
from merge.errors import MergeError
from merge.jsontext import parse_json

_MOST_SAID = 1 << 18  # bytes
_MOST_THREADS, _MOST_FILES, _MOST_WRITTEN = 64, 4096, 64 << 20  # bytes, to files
_TICK, _START = 0.05, 60.0  # seconds


class NotStarted(MergeError):
    """No process under these layers: nothing of the program was run."""


def run(
    layers: Collection[str], source: str, function: str, calls: Sequence[Sequence[object]], timeout: float, memory: int
) -> list[object]:
    """Like eval.sandbox.returned, under these layers; raises NotStarted if one of them is not available."""
    at = places()
    request = {
        "source": source,
        "function": function,
        "calls": [tuple(arguments) for arguments in calls],
        "limits": _limits(timeout, memory),
        "layers": list(layers),
        "readable": list(at.readable),
        "listable": list(at.listable),
        "aliases": list(at.aliases),
    }
    home = os.path.realpath(tempfile.mkdtemp(prefix="merge-eval-code-"))
    try:
        with tempfile.TemporaryFile() as file:
            file.write(marshal.dumps(request))
            file.seek(0)
            with subprocess.Popen(
                command(layers),
                stdin=file,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                cwd=home,
                env=environment(layers, home),
                start_new_session=True,
            ) as process:
                try:
                    said = _listen(process, home, 1 + len(calls), timeout)
                finally:
                    _end(process)
    finally:
        remove_tree(home)
    ready, *values = said.split(b"\n")
    if ready or not values:
        raise NotStarted(f"code cannot be run: a process under {', '.join(layers) or 'no guard'} did not start.")
    return list(_read(values[:-1][: len(calls)]))  # the last one is not whole


def _limits(timeout: float, memory: int) -> dict[str, int]:
    limits = {
        "RLIMIT_CPU": int(timeout) + 1,
        "RLIMIT_AS": memory,
        "RLIMIT_FSIZE": 1 << 20,
        "RLIMIT_NOFILE": 64,
        "RLIMIT_CORE": 1,  # none; with 0 a program that collects core dumps would still be started (man 5 core)
    }
    # On Linux that is a limit of threads, and counts those of all the user's programs.
    return limits if sys.platform == "linux" else limits | {"RLIMIT_NPROC": 1}


def _listen(process: subprocess.Popen[bytes], home: str, n_lines: int, timeout: float) -> bytes:
    """Its output: at most so many lines and _MOST_SAID bytes, until the time is over or it takes too much.

    The time begins with the first line, which says that the process is ready: that takes long on a busy machine.
    """
    assert process.stdout is not None
    pipe, said, ready = process.stdout.fileno(), bytearray(), threading.Event()

    def fill() -> None:
        lines = 0
        while lines < n_lines and len(said) < _MOST_SAID and (chunk := os.read(pipe, 1 << 14)):
            said.extend(chunk)
            lines += chunk.count(b"\n")
            ready.set()
        ready.set()

    listener = threading.Thread(target=fill, daemon=True)
    listener.start()
    ready.wait(_START)
    deadline = time.monotonic() + timeout
    while listener.is_alive() and ready.is_set() and (left := deadline - time.monotonic()) > 0:
        listener.join(min(left, _TICK))
        if _takes_too_much(process.pid) or _holds_too_much(home):
            break
    _end(process)
    listener.join(1.0)
    return bytes(said)


def _end(process: subprocess.Popen[bytes]) -> None:
    """Kills the process group; it is not reaped before, so the number is still its own."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        if hasattr(os, "killpg"):
            os.killpg(process.pid, signal.SIGKILL)
        else:
            process.kill()


def _takes_too_much(pid: int) -> bool:
    """Whether it has too many threads or has written too many bytes; never without /proc."""
    for each in _with_children(pid):
        with contextlib.suppress(OSError):
            status = Path(f"/proc/{each}/status").read_text()
            if any(int(number) > _MOST_THREADS for number in re.findall(r"^Threads:\s*(\d+)", status, re.M)):
                return True
            # What write() was given, and what was written through mapped memory too.
            written = re.findall(r"^(?:wchar|write_bytes): (\d+)", Path(f"/proc/{each}/io").read_text(), re.M)
            if any(int(number) > _MOST_WRITTEN for number in written):
                return True
    return False


def _holds_too_much(home: str) -> bool:
    """Whether the directory holds too many entries, in all its directories; True if they cannot be counted."""
    n, waiting = 0, [home]
    try:
        while waiting and n <= _MOST_FILES:
            with os.scandir(waiting.pop()) as entries:
                for entry in itertools.islice(entries, _MOST_FILES + 1 - n):
                    n += 1
                    if entry.is_dir(follow_symlinks=False):
                        waiting.append(entry.path)
    except FileNotFoundError:  # removed meanwhile
        return False
    except OSError:
        return True
    return n > _MOST_FILES


def _with_children(pid: int) -> Iterator[int]:
    yield pid
    with contextlib.suppress(OSError):
        for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split():
            yield from _with_children(int(child))


def _read(lines: Sequence[bytes]) -> Iterator[object]:
    """The values of lines, up to the first that is not JSON."""
    for line in lines:
        try:
            yield parse_json(line)
        except ValueError:
            return
