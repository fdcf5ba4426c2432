"""Where the time of a run goes: samples what the worker threads do, by function.

    python benchmarks/where_time_goes.py recipe.yaml OUT [--threads 2]

A thread in compiled code or in a system call is seen at the line of Python that called it, so kernels, reads, writes
and digests have lines of their own. Threads that wait are not counted. Run it twice: the first run compiles kernels.
"""

from __future__ import annotations

import argparse
import collections
import sys
import threading
import time
from pathlib import Path
from types import FrameType

import merge
from merge import build_plan, load_recipe, run_plan

_PACKAGE = str(Path(merge.__file__).parent)
_PERIOD = 0.003  # seconds


class Sampler(threading.Thread):
    """Counts, by (file, function) of this package, what the other threads are in."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.counts: collections.Counter[str] = collections.Counter()
        self._done = threading.Event()

    def run(self) -> None:
        while not self._done.wait(_PERIOD):
            for thread, frame in sys._current_frames().items():
                if thread != self.ident and (place := _place(frame)):
                    self.counts[place] += 1

    def stop(self) -> None:
        self._done.set()
        self.join()


def _place(frame: FrameType | None) -> str | None:
    if frame is None or frame.f_code.co_filename == threading.__file__ or frame.f_code.co_name == "_flush":
        return None  # it waits for another thread or for the disk
    while frame is not None:
        file, name = frame.f_code.co_filename, frame.f_code.co_name
        if file.startswith(_PACKAGE) and name not in ("<lambda>", "<listcomp>", "<genexpr>"):
            return f"{file[len(_PACKAGE) + 1 :]} {name}"
        frame = frame.f_back
    return None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--threads", type=int)
    arguments = parser.parse_args()
    plan = build_plan(load_recipe(arguments.recipe))
    sampler = Sampler()
    sys.setswitchinterval(_PERIOD / 3)
    sampler.start()
    cpu = time.process_time()
    report = run_plan(plan, arguments.out, threads=arguments.threads, force=True)
    cpu = time.process_time() - cpu
    sampler.stop()
    total = sum(sampler.counts.values())
    print(f"{report.seconds:.1f} s, {cpu:.1f} s of CPU, peak {report.peak_memory >> 20} MiB")
    for place, count in sampler.counts.most_common(20):
        print(f"{count / total:6.1%}  {place}")


if __name__ == "__main__":
    main()
