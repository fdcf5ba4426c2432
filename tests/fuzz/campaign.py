"""Many cases, in processes that are watched: one that hangs, or ends by itself, is a fault of the case it was at."""

from __future__ import annotations

import collections
import json
import os
import queue
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
PATIENCE = 120.0  # seconds of silence: the limits of a case are the processor's, and other programs may have it


@dataclass
class Report:
    """Cases by format and exit code, faults as text, and the slowest and largest cases."""

    codes: dict[str, collections.Counter[int]] = field(
        default_factory=lambda: collections.defaultdict(collections.Counter)
    )
    faults: list[str] = field(default_factory=list)
    seconds: float = 0.0  # of the processor, all cases
    slowest: tuple[float, str] = (0.0, "")
    largest: tuple[int, str] = (0, "")

    def add(self, line: dict[str, Any]) -> None:
        case = f"{line['format']} {line['seed']}"
        self.codes[line["format"]][line["code"]] += 1
        self.seconds += line["seconds"]
        self.slowest = max(self.slowest, (line["seconds"], case))
        self.largest = max(self.largest, (line["peak"], case))
        if line["fault"] is not None:
            self.faults.append(f"{case}: {line['fault']}")

    @property
    def cases(self) -> int:
        return sum(sum(counts.values()) for counts in self.codes.values())

    def __str__(self) -> str:
        lines = [
            f"{name}: {sum(counts.values()):,} cases, exit codes {dict(sorted(counts.items()))}"
            for name, counts in sorted(self.codes.items())
        ]
        return "\n".join(
            [
                *lines,
                f"{self.cases:,} cases, {self.seconds:,.0f} s of the processor; slowest {self.slowest[0]:.1f} s "
                f"({self.slowest[1]}), largest {self.largest[0] >> 20:,} MiB ({self.largest[1]}); "
                f"{len(self.faults)} faults",
                *self.faults,
            ]
        )


def campaign(parts: Sequence[tuple[str, int, int]], workers: int = 1) -> Report:
    """Tries the cases of each part (format, first seed, last seed), `workers` processes at a time."""
    report = Report()
    with ThreadPoolExecutor(workers) as pool:
        shares = [parts] if workers == 1 else [[part] for part in parts]  # of one process each
        for lines in pool.map(lambda share: list(_lines(share)), shares):
            for line in lines:
                report.add(line)
    return report


def _lines(parts: Sequence[tuple[str, int, int]]) -> Iterator[dict[str, Any]]:
    """What became of each case; after one that ended the process, another process goes on with the next."""
    left = list(parts)
    while left:
        begun: dict[str, Any] | None = None
        ended = ""
        for line in _watched([f"{name}:{first}:{last}" for name, first, last in left]):
            ended = line.get("ended", "")
            if "code" in line:
                yield line
            begun = line if "seed" in line and "code" not in line else begun if ended else None
        if ended == "exit code 0":
            return
        assert begun is not None, f"while cases were prepared: {ended}"
        yield begun | {"code": -1, "seconds": 0.0, "peak": 0, "fault": f"the process: {ended}"}
        name, seed = begun["format"], begun["seed"]
        place = next(i for i, part in enumerate(left) if part[0] == name and part[1] <= seed <= part[2])
        rest = (name, seed + 1, left[place][2])
        left = [*([rest] if rest[1] <= rest[2] else []), *left[place + 1 :]]


def _watched(arguments: list[str]) -> Iterator[dict[str, Any]]:
    """The lines of a process, and last {"ended": how}."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(HERE.parent), str(HERE.parent.parent)])}
    command = [sys.executable, "-W", "error", "-m", "fuzz.worker", *arguments]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)
    lines: queue.Queue[str | None] = queue.Queue()

    def read() -> None:
        assert process.stdout is not None
        for line in process.stdout:
            lines.put(line)
        lines.put(None)

    thread = threading.Thread(target=read, daemon=True)
    thread.start()
    try:
        while (line := lines.get(timeout=PATIENCE)) is not None:
            yield json.loads(line)
        said = process.communicate()[1]
        yield {"ended": f"exit code {process.returncode}" + (f": {said[-3000:]}" if process.returncode else "")}
    except queue.Empty:
        yield {"ended": f"no end after {PATIENCE:.0f} s"}
    finally:
        process.kill()
        process.wait()
