"""The order of steps: first small ones that compile kernels, one at a time; then the largest."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from merge.engine.costs import runs_in_torch
from merge.plan import Step

SMALL = 1 << 22  # elements: what one thread does while the others wait
_TINY, _BATCH = 1 << 14, 64  # elements; steps
Item = tuple[int, Step]


def in_order(todo: list[Item], device: str) -> tuple[list[Item], int]:
    """The steps in order, and how many of them one thread does before the others start.

    The first step of each kind compiles its kernels. These steps are small, and one thread does them, so no thread
    waits for the compiler of another thread that failed. The largest tensors (embeddings, heads) come next: at the end
    of a run one of them would keep a single thread busy.
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
    # Factors of adapters keep their own order: the two of a module are a few steps apart.
    rest = sorted(
        (item for item in todo if item[0] not in first),
        key=lambda item: item[1].nbytes < giant and item[1].kind != "factor",
    )
    return [*smallest.values(), *rest], len(first)


def batches(items: Sequence[Item]) -> Iterator[list[Item]]:
    """Groups the steps into runs, each for one thread: many tiny steps in one run.

    Tiny steps spend nearly all their time in the interpreter, which one thread at a time can use; several threads slow
    each other down. For 45,000 tensors two threads took 36 s, and one 20 s.
    """
    batch: list[Item] = []
    for item in items:
        if item[1].size > _TINY or item[1].kind == "factor":  # the factors of one module wait for each other
            yield [item]
            continue
        batch.append(item)
        if len(batch) == _BATCH:
            yield batch
            batch = []
    if batch:
        yield batch
