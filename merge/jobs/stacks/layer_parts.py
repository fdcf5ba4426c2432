"""Tensors outside the layers that hold a part for each layer: in a stack, each part follows its layer."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from merge.errors import Problem
from merge.methods import known_method
from merge.planning.inputs import Inputs
from merge.planning.targets import Slot, Target, Tower
from merge.recipe.model import Recipe, Settings, Slice
from merge.recipe.settings import resolve
from merge.sources.layer_parts import layer_parts


@dataclass(frozen=True)
class StackedLayer:
    """A layer of the result: its slice, its number in each of the slice's sources, and (model, number) of the base."""

    part: Slice
    numbers: tuple[int, ...]
    base: tuple[int, int] | None


def divided_tensors(inputs: Inputs, tower: Tower) -> dict[str, int]:
    """Names of the tensors of a tower with a part for each layer -> the axis along which the parts lie."""
    architecture = inputs.donor.architecture
    known = {each.name: each.axis for each in architecture.per_layer}
    if not known:
        return {}
    names = {name: architecture.parameter(name, known) for name in inputs.names if tower.owns(name)}
    return {name: known[own] for name, own in names.items() if own is not None}


def part_targets(
    recipe: Recipe, inputs: Inputs, tower: Tower, layers: Sequence[StackedLayer], divided: Mapping[str, int]
) -> Iterator[Target | Problem]:
    """A target for each of these tensors, or a problem."""
    for name, axis in divided.items():
        made = [_alike(tower, layer.part, name) for layer in layers]
        if any(each != made[0] for each in made):
            yield Problem(
                f"{name} holds a part for each layer, which slices with different numbers of sources, methods or "
                "parameters would merge differently.",
                recipe.where("slices"),
                "Give all slices the same, or merge them one by one.",
            )
            continue
        first = layers[0].part
        shared = (first.parameters, *tower.settings)
        rows = [list(zip(layer.part.sources, layer.numbers, strict=True)) for layer in layers]
        slots = []
        for place, source in enumerate(first.sources):
            origins = [(inputs.place(row[place][0].model), row[place][1]) for row in rows]
            slots.append(_slot(inputs, tower, name, axis, origins, (source.parameters, *shared)))
        bases = [layer.base for layer in layers if layer.base is not None]
        base = _slot(inputs, tower, name, axis, bases, shared) if bases else None
        method = first.merge_method or tower.method
        yield Target(name, tuple(slots), base, shared, 0.0, None, method)


def _alike(tower: Tower, part: Slice, name: str) -> object:
    """The settings that must be the same in all slices."""
    method = known_method(part.merge_method or tower.method)
    shared = (part.parameters, *tower.settings)
    levels = [(source.parameters, *shared) for source in part.sources]
    values = [[resolve(each, p.name, name, 0.0) for each in (*levels, shared)] for p in method.parameters]
    return method.name, len(part.sources), values, [source.statistics for source in part.sources]


def _slot(
    inputs: Inputs,
    tower: Tower,
    name: str,
    axis: int,
    origins: Sequence[tuple[int, int]],
    settings: tuple[Settings, ...],
) -> Slot:
    """The tensor assembled from the parts of these (model, layer); unchanged if the layers stay in place."""
    models = list(dict.fromkeys(model for model, _ in origins))
    counts = [stack.n_layers for model in models if (stack := tower.stack(inputs.all[model])) is not None]
    refs = [ref for model in models if (ref := inputs.all[model].tensors.get(name)) is not None]
    fits = len(refs) == len(models) and all(
        ref.shape[axis] % count == 0 and ref.shape[axis] // count == refs[0].shape[axis] // counts[0]
        for ref, count in zip(refs, counts, strict=True)
    )
    whole = len(models) == 1 and [layer for _, layer in origins] == list(range(counts[0]))
    if whole or not fits:  # if a model lacks it, or has another size, that is reported as for any tensor
        return Slot(models[0], name, settings)
    parts = [(models.index(model), layer) for model, layer in origins]
    return Slot(models[0], name, settings, made=layer_parts(name, refs, axis, counts, parts))
