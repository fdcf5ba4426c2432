"""In which order steps are taken: what compiles kernels alone, then the giants."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from merge.engine.costs import runs_in_torch
from merge.plan import Step

SMALL = 1 << 22  # elements: what one thread does while the others wait
_TINY, _BATCH = 1 << 14, 64  # elements; steps
Item = tuple[int, Step]


def in_order(todo: list[Item], device: str) -> tuple[list[Item], int]:
    """The steps in the order to take them, and how many of them one thread does alone.

    Kernels are compiled by the first steps of their kinds. Those are small, and done before other threads start: no
    thread then waits for the compiler of another one that failed. The giants (embeddings, heads) come next: the last
    tensor of a run should not keep one thread busy alone.
    """
    smallest: dict[tuple[object, ...], Item] = {}
    for item in todo:
        step = item[1]
        if step.size <= SMALL and step.kind == "merge" and not runs_in_torch(step, device):
            kind = (step.method, len(step.shape), step.dtype, *(source.dtype for source in step.sources))
            if kind not in smallest or step.size < smallest[kind][1].size:
                smallest[kind] = item
    first = {index for index, _ in smallest.values()}
    giant = max((step.nbytes for _, step in todo), default=0) // 2
    # Factors of adapters have an order of their own: the two of a module lie a little apart.
    rest = sorted(
        (item for item in todo if item[0] not in first),
        key=lambda item: item[1].nbytes < giant and item[1].kind != "factor",
    )
    return [*smallest.values(), *rest], len(first)


def batches(items: Sequence[Item]) -> Iterator[list[Item]]:
    """Steps in runs for one thread to do: tiny ones many at once.

    With these nearly all time is Python's own, of which one thread can run: several hinder each other. Of 45,000
    tensors two threads took 36 s and one 20 s.
    """
    batch: list[Item] = []
    for item in items:
        if item[1].size > _TINY or item[1].kind == "factor":  # the halves of one module wait for each other
            yield [item]
            continue
        batch.append(item)
        if len(batch) == _BATCH:
            yield batch
            batch = []
    if batch:
        yield batch
