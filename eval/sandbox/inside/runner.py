"""The confined process: gives up what it can, then runs the program and calls its function.

It reads one request from standard input (marshal: it comes from the process that started this one). To what was
standard output it writes an empty line when nothing is left to give up, and a line of JSON for each call that returned.
The program can write there too, and say whatever it likes of what its function returns; which values are right it is
never told.
"""

from __future__ import annotations

import contextlib
import json
import marshal
import os
import sys
import types
from collections.abc import Mapping, Sequence

from .audit import install
from .values import encode


def main() -> None:
    request = marshal.loads(sys.stdin.buffer.read())
    out = os.dup(1)
    null = os.open(os.devnull, os.O_RDWR)
    for number in (0, 1, 2):
        os.dup2(null, number)
    os.close(null)
    layers = request["layers"]
    if "rlimits" in layers:
        _limit(request["limits"])
    _confine(layers, request["readable"], request["listable"])
    if "audit hooks" in layers:
        install(os.getcwd(), [*request["readable"], *request["aliases"]], request["listable"])
    os.write(out, b"\n")  # ready
    _answer(out, request["source"], request["function"], request["calls"])


def _limit(limits: Mapping[str, int]) -> None:
    try:
        import resource
    except ImportError:  # Windows
        return
    for name, most in limits.items():
        # macOS has no limit of address space.
        with contextlib.suppress(AttributeError, ValueError, OSError):
            resource.setrlimit(getattr(resource, name), (most, most))


def _confine(layers: Sequence[str], readable: Sequence[str], listable: Sequence[str]) -> None:
    """Raises OSError if a requested layer is not available; then nothing is run."""
    if not {"namespaces", "landlock", "seccomp"} & set(layers):
        return
    from . import kernel

    home = os.getcwd()
    kernel.die_with_parent()
    if "namespaces" in layers:
        kernel.new_namespaces(home)
    kernel.give_up_privileges()
    if "landlock" in layers:
        kernel.landlock(home, readable, listable)
    if "seccomp" in layers:
        # Without a layer that limits which files may be written, none may.
        kernel.filter_calls(read_only=not {"bubblewrap", "landlock"} & set(layers))


def _answer(out: int, source: str, function: str, calls: Sequence[Sequence[object]]) -> None:
    answer = types.ModuleType("answer")
    sys.modules["answer"] = answer
    try:
        exec(compile(source, "answer.py", "exec"), vars(answer))
        for arguments in calls:
            value = vars(answer)[function](*arguments)
            os.write(out, json.dumps(encode(value)).encode() + b"\n")
    finally:
        os._exit(0)  # whatever threads still run
