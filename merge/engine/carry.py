"""Who carries out the steps of a run: threads of this process, or whoever else leaves their records in the sink."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

from merge.engine import copying, factors, merging
from merge.engine.context import Context
from merge.engine.numbers import check_numbers
from merge.engine.order import Item, batches, in_order
from merge.plan import Kind, Step

# carry(context, todo, tick): afterwards all of `todo` is in context.out.records. It calls tick ten times a second.
Carry = Callable[[Context, list[Item], Callable[[], None]], None]


class Executor(Protocol):
    """What the module of a kind of step has."""

    def run(self, context: Context, index: int, step: Step) -> dict[str, object]:
        """Computes and writes the step's tensor; returns its record for journal and manifest."""

    def sources(self, context: Context, step: Step) -> dict[str, object]:
        """The step's record of its sources, computed by reading them."""


EXECUTORS: dict[Kind, Executor] = {"copy": copying, "merge": merging, "factor": factors}


def by_threads(context: Context, todo: list[Item], tick: Callable[[], None]) -> None:
    """Carries out steps on the threads of this process. Raises what a step raises."""
    ordered, alone = in_order(todo, context.device)
    runs = [*([item] for item in ordered[:alone]), *batches(ordered[alone:])]
    context.crew.each(lambda run: _run_steps(context, run), runs, tick, alone)


def _run_steps(context: Context, items: Sequence[Item]) -> None:
    if len(items) == 1:
        _run_step(context, *items[0])
        return
    with context.tiny, context.out.together():
        for item in items:
            _run_step(context, *item)


def _run_step(context: Context, index: int, step: Step) -> None:
    record = EXECUTORS[step.kind].run(context, index, step)
    context.reader.release(step.sources)
    check_numbers(context.plan, step, record)
    context.out.finish(index, record)


class Ticker:
    """Reports the bytes of finished tensors; looks at each of them once, since there may be 100,000."""

    def __init__(self, context: Context, progress: Callable[[int], None]) -> None:
        self._context, self._progress = context, progress
        self._seen = self._bytes = 0

    def __call__(self) -> None:
        records = self._context.out.records
        if len(records) < self._seen:  # journaled tensors that were not whole
            self._seen = self._bytes = 0
        new = list(records)[self._seen :]
        self._seen += len(new)
        self._bytes += sum(self._context.plan.steps[i].nbytes for i in new)
        self._progress(self._bytes)
