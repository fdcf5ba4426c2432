"""Runs functions written by a model, and returns their results.

The program runs in a process of its own (inside/): isolated mode, empty environment, a temporary directory, limits, and
every layer of protection that the machine offers without privileges:

    bubblewrap   if `bwrap` is installed: no network, no other processes, no files but the standard library
    namespaces   Linux: no network; the temporary directory is a small file system in memory
    landlock     Linux 5.13: files outside of the temporary directory can be neither read nor written
    seccomp      Linux on x86_64 and aarch64: system calls that a pure function needs, and no others
    rlimits      processor time, memory, sizes of files, open files; all but Windows
    audit hooks  everywhere: refuses mistakes, but is no match for code written to get around it

guard() tries which of them work here, and results name them. A program is not run without them. This process
reads what the functions returned, as data and no more than a bound, and judges by itself: the program is never told
what is expected of it, so nothing that it writes makes a wrong answer right.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Collection, Sequence

from eval.sandbox.launch import has_bubblewrap
from eval.sandbox.places import places
from eval.sandbox.process import NotStarted, run
from merge.errors import MergeError

TIMEOUT = 10.0  # seconds
MEMORY = 1 << 30  # bytes of address space
_KERNEL = ("bubblewrap", "namespaces", "landlock", "seccomp")  # there or not, and only on Linux
LAYERS = (*_KERNEL, "rlimits", "audit hooks")


def returned(
    source: str,
    function: str,
    calls: Sequence[Sequence[object]],
    *,
    timeout: float = TIMEOUT,
    memory: int = MEMORY,
    allowed: Collection[str] = LAYERS,
) -> list[object]:
    """The values that a program's function returns, one for each call, encoded by inside/values.py.

    Args:
        source: Python that defines the function.
        calls: the positional arguments of each call, made of Python's literals.
        timeout: seconds, of processor and of wall-clock time, for the program and all calls together.
        memory: bytes of address space.
        allowed: layers to use if available; fewer than all only to try them one by one.

    Returns:
        One value for each call; fewer if the program ended, failed or was stopped before.

    Raises:
        MergeError: no process can be started on this machine, or not any more under the guard that worked before.
    """
    return run(guard(tuple(allowed)), source, function, calls, timeout, memory)


@functools.cache
def guard(allowed: tuple[str, ...] = LAYERS) -> tuple[str, ...]:
    """The layers that work on this machine, outermost first; see above."""
    others = [layer for layer in LAYERS if layer in allowed and layer not in _KERNEL]
    if sys.platform == "win32":
        others.remove("rlimits")
    found: list[str] = []
    for layer in _KERNEL if sys.platform == "linux" else ():
        if layer in allowed and _works([*found, layer, *others]):
            found.append(layer)
    if not found and not _works(others):
        raise MergeError(f"code cannot be run: {places().executable} could not be started as a process of its own.")
    return (*found, *others)


def described(layers: Sequence[str]) -> str:
    """A guard's description for users."""
    if not layers:
        return "the code that models wrote was run by lm-eval, without a guard"
    text = f"the code that models wrote was run under {', '.join(layers)}"
    return text if set(layers) & set(_KERNEL) else f"{text} only: a guard against mistakes, not against attacks"


# Threads, and a module that is a shared library: what the layers could get wrong.
_TRIAL = """
import threading, zlib
def trial(text):
    found = []
    thread = threading.Thread(target=lambda: found.append(zlib.decompress(zlib.compress(text))))
    thread.start()
    thread.join()
    return found[0]
"""


def _works(layers: Sequence[str]) -> bool:
    if "bubblewrap" in layers and not has_bubblewrap():
        return False
    try:
        return run(layers, _TRIAL, "trial", [[b"answer"]], TIMEOUT, MEMORY) == [["bytes", b"answer".hex()]]
    except NotStarted:
        return False
