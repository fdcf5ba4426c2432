"""One case: run in this process, measured, and held to what the tool promises of any input."""

from __future__ import annotations

import contextlib
import importlib
import io
import os
import random
import resource
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from bad_inputs.room import Arguments, call

from fuzz.place import Format, Place
from merge.cli import _shortened
from merge.errors import MergeError

MAX_SECONDS = 10.0  # of the processor
MAX_BYTES = 1 << 30  # resident, the interpreter and its libraries included
MAX_MESSAGE = 40_000  # characters
_ROOM_TO_MOVE = 3 << 30  # of addresses: threads reserve far more than they use


@dataclass(frozen=True)
class Verdict:
    """fault: what promise was broken; None if none was."""

    code: int
    seconds: float
    peak: int  # bytes
    fault: str | None


def load(name: str) -> Format:
    found: Format = importlib.import_module(f"fuzz.{name}").Format()
    return found


def prepare(name: str, folder: Path) -> tuple[Format, Place]:
    """A place with sound files, on which the command works: else all cases would fail for one reason."""
    format_, place = load(name), Place(folder)
    work = format_.set_up(place)
    code, out, err = _run(work)
    assert code == 0, f"{name}: {work}: {err or out}"
    place.keep()
    place.reset()
    return format_, place


def limit_memory() -> None:
    """What asks for gigabytes gets a MemoryError, and the machine stays usable."""
    used = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    resource.setrlimit(resource.RLIMIT_AS, (used + _ROOM_TO_MOVE, resource.RLIM_INFINITY))


def try_case(name: str, format_: Format, place: Place, seed: int, reset: bool = True) -> Verdict:
    work = format_.damage(place, random.Random(f"{name}:{seed}"))
    Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
    begun, fault, code, out, err = time.process_time(), None, -1, "", ""
    try:
        code, out, err = _run(work)
    except BaseException:  # a panic of Rust code is none of Exception
        fault = traceback.format_exc(limit=-6)
    seconds, peak = time.process_time() - begun, _peak()
    is_json = isinstance(work, list) and "--json" in work
    fault = fault or _broken(code, out, out if is_json and not err else err, seconds, peak, place)
    if code == 0 and isinstance(work, list) and work[0] == "run" and seed % 4 == 0:
        fault = fault or _unverified()
    if reset:
        place.reset()
    return Verdict(code, seconds, peak, None if fault is None else f"{_shown(work)}: {fault}")


def _run(work: Arguments | Callable[[], object]) -> tuple[int, str, str]:
    if isinstance(work, list):
        return call(work)
    out = io.StringIO()
    try:
        with contextlib.redirect_stdout(out):
            work()
    except MergeError as error:
        return error.exit_code, out.getvalue(), f"merge: {_shortened(error)}\n"
    return 0, out.getvalue(), ""


def _broken(code: int, out: str, err: str, seconds: float, peak: int, place: Place) -> str | None:
    if code not in (0, 1, 2):
        return f"exit code {code}"
    if "Traceback" in err or "Traceback" in out:
        return f"a traceback: {err[-2000:]}"
    if "out of memory" in err:
        return "out of memory"
    if code and not err.startswith(("merge: ", "note: ", "Usage: ", "{")):
        return f"no message: {err[:200]!r}"
    if sum(line.startswith("merge: ") for line in err.splitlines()) > 1:
        return f"several messages: {err[:500]}"
    if code and len(err) > MAX_MESSAGE and err is not out:
        return f"a message of {len(err):,} characters: {err[:200]}"
    if code and (place.path / "out").exists():
        return f"a result beside the error: {err[:500]}"
    if seconds > MAX_SECONDS:
        return f"{seconds:.1f} s of the processor"
    return f"{peak >> 20:,} MiB" if peak > MAX_BYTES else None


def _unverified() -> str | None:
    code, out, err = call(["verify", "out"])
    return None if code == 0 else f"the result is not what was written: {out}{err}"


def _peak() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))


def _shown(work: Arguments | Callable[[], object]) -> str:
    return f"merge {' '.join(work)}" if isinstance(work, list) else getattr(work, "__name__", "call")
