"""A job, stopped at chosen calls: what stands then, and what the same command makes of it afterwards."""

from __future__ import annotations

import collections
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from kills.injector import KILLED

HERE = Path(__file__).resolve().parent
Snapshot = dict[str, str]  # path -> digest
_PLACING = ("rename", "replace", "exchange")
# Of this process: times, which answers of an evaluation were known before, the mean loss since a training resumed.
_OF_THE_PROCESS = re.compile(rb'"\w*(?:seconds|_second|runtime|asked|remembered|train_loss)": *[^,}\n]+')


@dataclass(frozen=True)
class Job:
    """A command that writes.

    Attributes:
        set_up: makes what it reads, in the working directory.
        before: commands that are run first; with one that makes `out`, the job replaces that.
        outs: what it makes, directories or files, each of which is whole when it is there.
        exchange: False where the system cannot exchange two names.
    """

    name: str
    set_up: Callable[[], None]
    words: Sequence[str]
    outs: Sequence[str] = ("out",)
    before: Sequence[Sequence[str]] = ()
    exchange: bool = True


@dataclass
class Count:
    """What a campaign did. `faults`: promises that were broken."""

    calls: int = 0
    kinds: collections.Counter[str] = field(default_factory=collections.Counter)
    faults: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        points = ", ".join(f"{number} {kind}" for kind, number in sorted(self.kinds.items()))
        return "\n".join([f"{self.calls} calls; {points}; {len(self.faults)} faults", *self.faults])


class Children:
    """Forks of a process that has imported what they need; a context. `everything`: what training needs too."""

    def __init__(self, everything: bool) -> None:
        self.everything = everything

    def __enter__(self) -> Children:
        path = os.pathsep.join([str(HERE.parent), str(HERE.parent.parent)])
        threads = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1")
        self._process = subprocess.Popen(
            [sys.executable, "-m", "kills.child", *(["all"] if self.everything else [])],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | threads | {"PYTHONPATH": path, "COLUMNS": "200", "NO_COLOR": "1"},
        )
        self._answer()
        return self

    def __exit__(self, *exc: object) -> None:
        self._process.communicate()

    def run(self, cwd: Path, words: Sequence[str], exchange: bool = True, kind: str = "count", point: int = 0) -> Any:
        request = {"cwd": str(cwd), "words": list(words), "kind": kind, "point": point, "exchange": exchange}
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        return self._answer()

    def _answer(self) -> Any:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        assert line, "the process that forks ended"
        return json.loads(line)


class Trial:
    """A job in a folder, and what it makes there when nothing stops it."""

    def __init__(self, job: Job, folder: Path, children: Children) -> None:
        self.job, self._children = job, children
        self._kept, self.room = folder / "kept", folder / "room"
        self.room.mkdir(parents=True)
        here = os.getcwd()
        os.chdir(self.room)
        try:
            job.set_up()
        finally:
            os.chdir(here)
        (self.room / "tmp").mkdir()
        for words in job.before:
            done = self._run(words)
            assert done["code"] == 0, done["err"]
        shutil.rmtree(self.room / "cache", ignore_errors=True)
        shutil.copytree(self.room, self._kept, symlinks=True)
        if not children.everything:
            self._run(job.words, "warm")
            self._reset()
        self.before = self._seen()
        done = self._run(job.words)
        assert done["code"] == 0, f"{job.name}: {done['err']}"
        self.calls = [tuple(call) for call in done["calls"]]
        self.after = self._seen()

    def campaign(self, kills: int, errors: int) -> Count:
        """So many kills, and so many errors of each kind."""
        count = Count(len(self.calls))
        for kind, number in (("kill", kills), ("full", errors), ("broken", errors)):
            others = self._around(self.job.outs[:-1]) if kind == "kill" else []
            for point in sorted({*self.points(number), *others}):
                count.kinds[kind] += 1
                fault = self.stop(kind, point)
                if fault is not None:
                    call, path = self.calls[point - 1]
                    count.faults.append(f"{self.job.name}, {kind} at {point} ({call} {path}): {fault}")
        return count

    def points(self, number: int) -> list[int]:
        """The first and the last call, those where the result gets its name, and others evenly between."""
        n = len(self.calls)
        near = [*self._around(self.job.outs[-1:]), n, 1]
        chosen = list(dict.fromkeys(near))[:number]
        rest = [i for i in range(1, n + 1) if i not in chosen]
        left = min(number - len(chosen), len(rest))
        return sorted([*chosen, *(rest[(2 * i + 1) * len(rest) // (2 * left)] for i in range(left))])

    def _around(self, outs: Sequence[str]) -> list[int]:
        """The calls that give results their names, those after these, and those about their OUT.finished."""
        calls = list(enumerate(self.calls, start=1))
        placed = [i for out in outs for i, (call, path) in calls if path == out and call in _PLACING]
        notes = [f"{out}.finished" for out in outs]
        noted = [i for i, (call, path) in calls if path in notes and call in ("replace", "unlink")]
        return [*placed, *(i + 1 for i in placed if i < len(calls)), *noted]

    def stop(self, kind: str, point: int) -> str | None:
        """Stops the command once, and runs it again; what was wrong, if anything was."""
        self._reset()
        done = self._run(self.job.words, kind, point)
        stands = self._stands()
        if stands is not None:
            return f"then, {stands}"
        now = self._seen()
        if done["code"] == 0:  # it could do without; what it left among temporary files, the next one removes
            now = {path: digest for path, digest in now.items() if not path.startswith("tmp/")}
        if done["code"] in (0, KILLED) and now == self.after:
            return None  # all was done
        if kind != "kill" and (wrong := _unclear(done)):
            return wrong
        again = self._run(self.job.words)
        if again["code"] != 0 or "Traceback" in again["err"]:
            return f"again, exit code {again['code']}: {again['err'][-1500:]}"
        return differences(self.after, self._seen())

    def _stands(self) -> str | None:
        """What is wrong with what stands now: a result that is neither the old nor the new one, or a source changed."""
        now = self._seen()
        for out in self.job.outs:
            here, old, new = (_below(seen, out) for seen in (now, self.before, self.after))
            if not here and old and not self.job.exchange:  # for a moment, between two renames
                here = _below(now, f"{out}.partial/replaced")
            if here not in (old, new):
                return f"{out} is neither the old nor the new result: {sorted(here)}"
        sources = [path for path in self.before if not any(f"{path}/".startswith(f"{out}/") for out in self.job.outs)]
        lost = [path for path in sources if self.after.get(path) == self.before[path] != now.get(path)]
        return f"lost or changed: {lost}" if lost else None

    def _run(self, words: Sequence[str], kind: str = "count", point: int = 0) -> Any:
        return self._children.run(self.room, words, self.job.exchange, kind, point)

    def _reset(self) -> None:
        shutil.rmtree(self.room)
        shutil.copytree(self._kept, self.room, symlinks=True)

    def _seen(self) -> Snapshot:
        return snapshot(self.room)


def snapshot(room: Path) -> Snapshot:
    """Digest of what every file says that another process would say too; "" of a directory."""
    found = {}
    for place in sorted(room.rglob("*")):
        name = place.relative_to(room).as_posix()
        if not name.startswith("cache"):  # answers of evaluations, whose number is another after a kill
            found[name] = hashlib.sha256(_said(place)).hexdigest() if place.is_file() else ""
    return found


def _said(file: Path) -> bytes:
    if file.name.startswith("."):
        return b""  # notes on the state of other files: times and inodes
    data = file.read_bytes()
    if file.suffix in (".json", ".md", ".html"):
        data = _OF_THE_PROCESS.sub(b'"x": 0', data)
    if file.name == "training_log.json":  # the keys of an entry that was read back are sorted
        data = json.dumps(json.loads(data), sort_keys=True).encode()
    return data


def differences(wanted: Snapshot, found: Snapshot) -> str | None:
    left = [path for path in found if path not in wanted]
    lacking = [path for path in wanted if path not in found]
    other = [path for path in wanted if path in found and wanted[path] != found[path]]
    said = [
        f"{what}: {paths}" for what, paths in (("left", left), ("lacking", lacking), ("other bytes", other)) if paths
    ]
    return "; ".join(said) or None


def _below(seen: Snapshot, path: str) -> Snapshot:
    return {name[len(path) :]: digest for name, digest in seen.items() if name == path or name.startswith(f"{path}/")}


def _unclear(done: Any) -> str | None:
    """What is wrong with how a failure is reported."""
    said = [line for line in done["err"].splitlines() if line.startswith("merge: ")]
    if "Traceback" in done["err"] or done["code"] != 1 or len(said) != 1:
        return f"exit code {done['code']}, {done['err'][-1500:]!r}"
    return None
