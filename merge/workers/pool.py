"""Carries out a plan's steps on workers: `run_plan(plan, out, carry=Pool(...))`.

The run itself stays in this process: it has the lock and the journal, finds what has to be known first, and writes the
manifest last. Workers are given a plan's digest and the numbers of steps; they read sources and write tensors at their
final offsets themselves, and give back the records. So the bytes are the same whoever did what, and when this process
is killed, the same command resumes, with or without workers.
"""

from __future__ import annotations

import itertools
import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Protocol

from merge.engine.context import Context
from merge.engine.order import Item, in_order
from merge.errors import MergeError, OutputError, UsageError
from merge.output.shared import OnDone
from merge.output.writer import OutputDirectory
from merge.quoting import some
from merge.workers.assigned import Assignment, write_plan
from merge.workers.scheduler import MOST_LOSSES, Scheduler

PATIENCE = 60.0  # seconds without a sign of life after which a worker is given up
_BATCHES_EACH = 8  # batches for each worker at least, so that all end at about the same time
_LARGEST, _MOST_STEPS = 1 << 30, 512  # bytes and steps of one batch
_RESTARTS = 3  # in a row, without a step done in between


class WorkerLost(Exception):
    """A worker died or gave no sign of life; the message says how it ended."""


class RemoteWorker(Protocol):
    """One worker, as the pool sees it; used by one thread, `kill` from any."""

    def start(self, assignment: Assignment) -> None:
        """Raises WorkerLost; MergeError: what is wrong with the assignment."""

    def run(self, steps: Sequence[int], on_done: OnDone) -> None:
        """Has steps carried out. Raises WorkerLost, or the MergeError of a step."""

    def kill(self) -> None:
        """Ends it at once, whatever it is doing."""

    def close(self) -> None:
        """Ends it and gives back what it took here."""


class Pool:
    """
    Args:
        make: a new worker, by its name.
        n: how many work at a time.
        threads, max_ram: of each worker; see run_plan.
        durable: see Assignment.
        method_files: files of user's methods that workers need.
    """

    def __init__(
        self,
        make: Callable[[str], RemoteWorker],
        n: int,
        *,
        threads: int | None = None,
        max_ram: int | None = None,
        durable: bool = False,
        method_files: Sequence[Path] = (),
    ) -> None:
        self._make, self._n, self._threads, self._max_ram, self._durable = make, n, threads, max_ram, durable
        self._method_files = tuple(os.path.abspath(file) for file in method_files)

    def __call__(self, context: Context, todo: list[Item], tick: Callable[[], None]) -> None:
        """See merge.engine.carry."""
        out = context.out
        if not isinstance(out, OutputDirectory):
            raise UsageError("workers write into a directory; a result in memory needs threads.")
        if not todo:
            return
        write_plan(out)
        assignment = Assignment(
            directory=os.getcwd(),
            partial=os.path.abspath(out.partial),
            digest=out.identity["plan"],
            threads=self._threads,
            max_ram=self._max_ram,
            device=context.device,
            method_files=self._method_files,
            durable=self._durable,
        )
        ordered, _ = in_order(todo, context.device)
        scheduler = Scheduler([[index for index, _ in batch] for batch in batches_for(ordered, self._n)])
        _Campaign(self._make, self._n, assignment, scheduler, out).carry_out(tick)


def batches_for(items: Sequence[Item], n_workers: int) -> Iterator[list[Item]]:
    """Neighbouring steps, which lie in the same files; several batches for each worker."""
    size = min(_LARGEST, sum(step.nbytes for _, step in items) // (n_workers * _BATCHES_EACH) + 1)
    batch: list[Item] = []
    room = size
    for unit in _units(items):
        if batch and (room <= 0 or len(batch) + len(unit) > _MOST_STEPS):
            yield batch
            batch, room = [], size
        batch += unit
        room -= sum(step.nbytes for _, step in unit)
    if batch:
        yield batch


def _units(items: Sequence[Item]) -> Iterator[list[Item]]:
    """What one worker has to do together: both factors of a decomposition; some A come before their B."""
    unit: list[Item] = []
    for item in items:
        last, this = unit[-1][1].factor if unit else "", item[1].factor
        if unit and (not this or not last or (last, this) == ("B", "A")):
            yield unit
            unit = []
        unit.append(item)
    if unit:
        yield unit


class _Campaign:
    """One thread for each worker, which gives it work and takes its records, until all steps are done."""

    def __init__(
        self,
        make: Callable[[str], RemoteWorker],
        n: int,
        assignment: Assignment,
        scheduler: Scheduler,
        out: OutputDirectory,
    ) -> None:
        self._make, self._assignment, self._scheduler, self._out = make, assignment, scheduler, out
        self._change = threading.Condition()
        self._at_work: dict[str, RemoteWorker] = {}
        self._error: BaseException | None = None
        self._ends: list[str] = []  # how workers ended that were not replaced
        self._names = map("worker {}".format, itertools.count(1))
        self._threads = [threading.Thread(target=self._serve, daemon=True) for _ in range(n)]

    def carry_out(self, tick: Callable[[], None]) -> None:
        for thread in self._threads:
            thread.start()
        try:
            while any(thread.is_alive() for thread in self._threads) and not self._is_over():
                time.sleep(0.1)
                tick()
        finally:
            with self._change:
                self._error = self._error or (None if self._scheduler.finished else _Over())
                self._change.notify_all()
                for worker in self._at_work.values():
                    worker.kill()
            for thread in self._threads:
                thread.join()
        tick()
        if self._scheduler.finished:
            return
        if self._error is not None and not isinstance(self._error, _Over):
            raise self._error
        raise MergeError(f"no worker is left: {some(list(dict.fromkeys(self._ends)))}. Finished tensors are kept.")

    def _is_over(self) -> bool:
        with self._change:
            return self._scheduler.finished or self._error is not None

    def _serve(self) -> None:
        """One worker's place: it is filled again when its worker dies."""
        failures = 0
        while not self._is_over():
            with self._change:
                name = next(self._names)
                worker = self._at_work[name] = self._make(name)
            before = len(self._out.records)
            try:
                worker.start(self._assignment)
                self._feed(name, worker)
                return
            except WorkerLost as loss:
                failures = 0 if len(self._out.records) > before else failures + 1
                if failures > _RESTARTS:
                    self._ends.append(str(loss))
                    return
            except OutputError as error:  # its disk may be full where others' are not
                self._ends.append(str(error))
                return
            except BaseException as error:
                with self._change:
                    self._error = self._error or error
                return
            finally:
                self._part_with(name, worker)

    def _feed(self, name: str, worker: RemoteWorker) -> None:
        while True:
            with self._change:
                while not (steps := self._scheduler.take(name, time.monotonic())):
                    if self._scheduler.finished or self._error is not None:
                        return
                    self._change.wait(0.5)
            worker.run(steps, self._done)
            with self._change:
                self._scheduler.returned(name)

    def _done(self, index: int, record: object) -> None:
        with self._change:
            if self._scheduler.done(index, time.monotonic()):
                self._out.finish(index, dict(record))  # type: ignore[call-overload]
            if self._scheduler.finished:
                self._change.notify_all()

    def _part_with(self, name: str, worker: RemoteWorker) -> None:
        worker.close()
        with self._change:
            del self._at_work[name]
            fatal = self._scheduler.lost(name)
            if fatal is not None and self._error is None:
                step = self._out.plan.steps[fatal].name
                self._error = MergeError(
                    f"{step}: {MOST_LOSSES} workers died at it or soon after. It may need more memory than they have."
                )
            self._change.notify_all()


class _Over(Exception):
    """The campaign is to end: it was interrupted, or nobody is left."""
