"""Trims whole task vectors, as in the TIES paper: one threshold for each model, not for each tensor.

The search is that of merge.kernels.selection, with histograms summed over tensors. Of equal magnitudes, those in
earlier output tensors stay, and within a tensor those of lowest flat index.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

from merge.kernels.protocol import Block
from merge.kernels.selection import (
    KEEP_ALL,
    BitWindow,
    Search,
    Threshold,
    count_equal,
    count_kept,
    place_cuts,
)

if TYPE_CHECKING:
    from merge.engine.context import Context
    from merge.plan import Step

Steps = list[tuple[int, "Step"]]
_NOTE = "model_thresholds"


def thresholds(context: Context, steps: Steps, tick: Callable[[], None]) -> dict[int, dict[str, object]]:
    """The `_threshold` of every step that trims over the whole model, from the journal if it is there."""
    if _NOTE not in context.out.notes:
        found = _search(context, steps, tick)
        context.out.keep(_NOTE, {str(i): [[t.bits, t.cut] for t in limits] for i, limits in found.items()})
    kept = context.out.notes[_NOTE]
    return {i: {"_threshold": tuple(Threshold(*pair) for pair in kept[str(i)])} for i, _ in steps}


def _search(context: Context, steps: Steps, tick: Callable[[], None]) -> dict[int, list[Threshold]]:
    sizes: dict[int, int] = {}
    densities: dict[int, float] = {}
    for _, step in steps:
        for place, model in enumerate(step.models):
            sizes[model] = sizes.get(model, 0) + step.size
            densities[model] = step.parameters["density"][place]  # the plan checked that it is the same everywhere
    searches = {model: Search(0, count_kept(densities[model], size), size) for model, size in sizes.items()}
    while pending := {model: search for model, search in searches.items() if not search.found}:
        _narrow(context, steps, pending, tick)
    return _place(context, steps, searches, tick)


def _narrow(context: Context, steps: Steps, searches: dict[int, Search], tick: Callable[[], None]) -> None:
    totals = {model: BitWindow(search) for model, search in searches.items()}
    lock = threading.Lock()

    def count(item: tuple[int, Step]) -> None:
        _, step = item
        rows = [(model, place + 1) for place, model in enumerate(step.models) if model in searches]
        windows = {model: BitWindow(searches[model]) for model, _ in rows}
        tensor = context.tensor(step)
        for chunk in range(tensor.n_chunks):
            block = tensor.load(chunk)
            for model, row in rows:
                windows[model].count(block, row, searches[model])
        with lock:
            for model, window in windows.items():
                totals[model].add(window)

    by_size = sorted(steps, key=lambda item: item[1].size)
    context.crew.each(count, by_size[:1] + by_size[:0:-1], tick, alone=1)
    for model, search in searches.items():
        search.place(totals[model])


def _place(
    context: Context, steps: Steps, searches: dict[int, Search], tick: Callable[[], None]
) -> dict[int, list[Threshold]]:
    """Distributes each model's quota of entries equal to its threshold over the tensors, in their order."""
    equal: dict[int, list[int]] = {}

    def count(item: tuple[int, Step]) -> None:
        index, step = item
        tensor = context.tensor(step)

        def in_block(block: Block) -> list[int]:
            bits = [searches[model].threshold.bits for model in step.models]
            return [int(count_equal(block.raw, row, np.uint32(b))) for row, b in enumerate(bits, 1)]

        equal[index] = [sum(column) for column in zip(*tensor.map_chunks(in_block), strict=True)]

    context.crew.each(count, steps, tick)
    left = {model: search.quota for model, search in searches.items()}
    found: dict[int, list[Threshold]] = {}
    for index, step in steps:
        partial: list[Search] = []
        limits = [searches[model].threshold for model in step.models]
        for place, model in enumerate(step.models):
            quota = left[model]
            if quota is None:
                continue
            here = equal[index][place]
            left[model] = max(0, quota - here)
            limits[place] = Threshold(limits[place].bits, KEEP_ALL.cut if here <= quota else 0)
            if 0 < quota < here:
                partial.append(Search.settled(place, limits[place].bits, quota))
        place_cuts(partial, context.tensor(step))
        for search in partial:
            limits[search.model] = search.threshold
        found[index] = limits
    return found
