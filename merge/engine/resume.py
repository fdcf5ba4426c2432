"""After a kill: which journaled tensors are really there, byte for byte."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from merge.chunks import Chunks, chunk_digest, tensor_digest
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
    chunks = Chunks.of(step.shape)
    itemsize = DTYPES[step.dtype].itemsize
    digests = []
    for chunk in range(chunks.count):
        start, stop = chunks.span(chunk)
        data = context.buffers.encoded((stop - start) * itemsize, np.dtype(np.uint8))
        context.out.read_into(step, start, data.data, itemsize)
        digests.append(chunk_digest(data.data))
    return tensor_digest(digests)
