"""After a kill: which journaled tensors are really there, byte for byte, and whether they fit the sources of now."""

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
    """Forgets journal lines whose tensor no longer matches its digest; returns how many tensors need no more work."""
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
    """Compares what journaled tensors were made from with the files that changed since, which may be equal copies.

    Args:
        sources: what the record of a step says of its sources, found by reading them.

    Raises:
        StaleWork: they are not, and going on would mix two sources.
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
    """The tensor and all that it is computed from."""
    yield ref
    for inner in ref.inputs if isinstance(ref, Derived) else ():
        yield from _parts(inner)


def _may_differ(ref: TensorRef, changed: frozenset[str]) -> bool:
    """Whether it comes from one of these files; what a run finds out itself, it may have found in any of them."""
    return ref.operation == FOUND if isinstance(ref, Derived) else ref.file in changed
