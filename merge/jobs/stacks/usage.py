"""Notes on slices: layers that are used several times, and layers that are left out."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import groupby

from merge.planning.inputs import Inputs
from merge.recipe.model import Slice

_TIMES = {0: "not used", 2: "used twice"}


def usage_notes(inputs: Inputs, slices: Sequence[Slice], lengths: Mapping[int, int]) -> list[str]:
    """`layers 8 to 15 of NAME are used twice`: normal in a stack, and worth a look.

    Args:
        lengths: number of layers of each input that has any, by its place.
    """
    used: dict[int, Counter[int]] = {}
    for part in slices:
        for source in part.sources:
            assert source.layer_range is not None
            used.setdefault(inputs.place(source.model), Counter()).update(range(*source.layer_range))
    notes = []
    for place, counts in used.items():
        name = inputs.all[place].ref.text
        spans: dict[int, list[str]] = {}
        start = 0
        for times, layers in groupby(counts[layer] for layer in range(lengths[place])):
            end = start + len(list(layers))
            spans.setdefault(times, []).append(_span(start, end))
            start = end
        for times, found in sorted(spans.items()):
            if times != 1:
                one = len(found) == 1 and " " not in found[0]
                shown = ", ".join(found[:8]) + (", ..." if len(found) > 8 else "")
                how = _TIMES.get(times, f"used {times} times")
                notes.append(f"layer{'' if one else 's'} {shown} of {name} {'is' if one else 'are'} {how}")
    return notes


def _span(start: int, end: int) -> str:
    return str(start) if end == start + 1 else f"{start} to {end - 1}"
