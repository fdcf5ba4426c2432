"""Resuming: keeps the journaled tensors whose bytes match their digests and whose sources have not changed."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np

from merge.chunks import digest_of
from merge.dtypes import DTYPES
from merge.engine.context import Context
from merge.plan import Derived, Step, TensorRef
from merge.quoting import some
from merge.sources import FOUND


def still_good(context: Context, tick: Callable[[], None]) -> int:
    """Drops journal lines whose tensor does not match its digest; returns how many tensors are finished."""
    records = context.out.records
    bad: list[int] = []

    def check(index: int) -> None:
        if written_digest(context, context.plan.steps[index]) != records[index]["digest"]:
            bad.append(index)

    if records:
        context.crew.each(check, sorted(records), tick)
    for index in bad:
        del records[index]
    return len(records)


def written_digest(context: Context, step: Step) -> str:
    itemsize = DTYPES[step.dtype].itemsize

    def read(start: int, stop: int) -> memoryview:
        data = context.buffers.encoded((stop - start) * itemsize, np.dtype(np.uint8)).data
        context.out.read_into(step, start, data, itemsize)
        return data

    return digest_of(step.shape, read)


def check_sources(context: Context, sources: Callable[[Step], dict[str, object]], tick: Callable[[], None]) -> None:
    """Checks that source files with another size or time than in the journal still have the same contents.

    Args:
        sources: a step's record of its sources, computed by reading them.

    Raises:
        StaleWork: they differ; resuming would mix two versions of a source.
    """
    out = context.out
    if not out.changed:
        return

    def check(index: int) -> None:
        step, record = context.plan.steps[index], out.records[index]
        read = [part for ref in (*step.sources, *step.statistics) for part in _parts(ref)]
        if not any(_may_differ(part, out.changed) for part in read):
            return
        if any(record.get(key) != value for key, value in sources(step).items()):
            files = sorted({part.file for part in read} & out.changed) or sorted(out.changed)
            raise out.stale(f"{step.name} in {some(files)}")
        context.reader.release(step.sources)

    context.crew.each(check, sorted(out.records), tick)


def _parts(ref: TensorRef) -> Iterator[TensorRef]:
    """A tensor and everything it is computed from."""
    yield ref
    for inner in ref.inputs if isinstance(ref, Derived) else ():
        yield from _parts(inner)


def _may_differ(ref: TensorRef, changed: frozenset[str]) -> bool:
    """Whether the tensor comes from one of these files. Findings may depend on any of them."""
    return ref.operation == FOUND if isinstance(ref, Derived) else ref.file in changed
