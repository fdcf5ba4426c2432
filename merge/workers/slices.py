"""One part of a run, `--slice 2/8`: for schedulers that start many processes, on machines that share a folder.

Slices of a plan work in one OUT.partial, each with a journal of its own and without knowing of the others, in any order
and at any time. An ordinary run of the same recipe then takes what all of them did, does the rest, and completes OUT.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import filelock

from merge.checkpoint.reader import SourceReader
from merge.engine import memory
from merge.engine.carry import Ticker, by_threads
from merge.engine.context import Context, check_method
from merge.engine.crew import Crew
from merge.engine.find import find_all
from merge.engine.order import Item
from merge.engine.preflight import check_models
from merge.engine.resume import still_good
from merge.engine.space import check_space
from merge.errors import OutputError, UsageError
from merge.output.directory import LOCK, explained
from merge.output.identity import source_files
from merge.output.journal import Journal, read_journal
from merge.output.shared import SharedShards
from merge.output.writer import OutputDirectory
from merge.plan import Plan
from merge.workers.pool import batches_for

_SETTLING = 60.0  # seconds that other slices may take to make the shards
_PARTS = 8  # batches for each slice


@dataclass(frozen=True)
class SliceReport:
    """What one slice did; bytes and tensors are of this slice, resumed ones included."""

    out: str
    slice: str
    tensors: int
    of_tensors: int
    bytes_written: int
    seconds: float


def run_slice(
    plan: Plan,
    out: Path,
    number: int,
    of: int,
    *,
    threads: int | None = None,
    max_ram: int | None = None,
    device: str = "cpu",
    progress: Callable[[int], None] = lambda done: None,
) -> SliceReport:
    """Does slice `number` (from 1) of `of`; again, it resumes. Arguments and errors are those of run_plan."""
    if not 1 <= number <= of:
        raise UsageError(f"--slice {number}/{of}: expected 1/{of} to {of}/{of}.")
    check_method(plan)
    began = time.monotonic()
    budget = memory.budget(plan, threads, max_ram, device)
    directory = _made(plan, out, device)
    if directory.finished is not None:
        return SliceReport(str(out), f"{number}/{of}", 0, len(plan.steps), 0, 0.0)
    path = directory.partial / f"slice-{number}-of-{of}.jsonl"
    with contextlib.ExitStack() as stack:
        stack.enter_context(_locked(path.with_suffix(".lock"), f"{number}/{of}"))
        with explained(directory.partial):
            lines, whole = read_journal(path)
            if lines[:1] != [directory.identity]:
                lines, whole = [], 0
            journal = Journal(path, whole)
            stack.callback(journal.close)
            if not lines:
                journal.append(directory.identity)
        sink = stack.enter_context(
            SharedShards(plan, directory.partial, lambda index, record: journal.append({"step": index, **record}))
        )
        reader = stack.enter_context(SourceReader(source_files(plan)))
        context = Context(plan, reader, Crew(budget.threads), sink, device, budget)
        mine = slice_of(list(enumerate(plan.steps)), number, of)
        size = sum(step.nbytes for _, step in mine)
        sink.records.update({line["step"]: line for line in lines[1:]})
        tick = Ticker(context, progress)
        find_all(context, tick, before_checks=True)
        check_models(context)
        still_good(context, tick)
        find_all(context, tick, before_checks=False)
        by_threads(context, [item for item in mine if item[0] not in sink.records], tick)
        reader.check_unchanged()
        sink.sync()
        return SliceReport(
            str(out), f"{number}/{of}", len(mine), len(plan.steps), size, round(time.monotonic() - began, 3)
        )


def slice_of(items: Sequence[Item], number: int, of: int) -> list[Item]:
    """The steps of one slice: neighbours together, and about the same bytes in each slice."""
    loads = [0] * of
    mine: list[Item] = []
    batches = sorted(batches_for(items, of * _PARTS), key=lambda batch: -sum(step.nbytes for _, step in batch))
    for batch in batches:
        least = loads.index(min(loads))
        loads[least] += sum(step.nbytes for _, step in batch)
        if least == number - 1:
            mine += batch
    return sorted(mine, key=lambda item: item[0])


def _made(plan: Plan, out: Path, device: str) -> OutputDirectory:
    """OUT.partial with its shards, made by whichever slice comes first."""
    check_space(plan, out)
    last = time.monotonic() + _SETTLING
    while True:
        directory = OutputDirectory(plan, out, False, device, beside_slices=True)
        try:
            with directory:
                return directory
        except OutputError:
            # Another slice is making it, as a rule; a whole run would go on for longer.
            if time.monotonic() > last or not (directory.partial / LOCK).exists():
                raise
            time.sleep(0.2)


@contextlib.contextmanager
def _locked(path: Path, name: str) -> Iterator[None]:
    lock = filelock.FileLock(path)
    try:
        lock.acquire(timeout=0)
    except filelock.Timeout:
        raise OutputError(f"{path.parent}: slice {name} is being done by another run.") from None
    try:
        yield
    finally:
        lock.release()
