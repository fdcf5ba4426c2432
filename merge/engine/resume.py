"""After a kill: which journaled tensors are really there, byte for byte."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from merge.chunks import digest_of
from merge.dtypes import DTYPES
from merge.engine.executors import Context
from merge.plan import Step


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
