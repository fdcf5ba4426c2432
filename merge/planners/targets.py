"""Which source tensors go into which output tensor: whole models, and slices of layers stacked on each other."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from merge.architecture import Stack, is_input_side
from merge.errors import Problem
from merge.output.config import LayerOrigins
from merge.planners.inputs import Inputs
from merge.recipe.model import ModelRef, Recipe, Settings, Slice, Source


@dataclass(frozen=True)
class Slot:
    """One source of an output tensor: the model (index in Inputs.all), the common name there, its settings and file."""

    model: int
    name: str
    settings: tuple[Settings, ...]  # innermost first
    statistics: str | None = None
    units: int | None = None  # in Plan.units, where it is read in another order


@dataclass(frozen=True)
class Target:
    """One output tensor before its numbers are resolved.

    Attributes:
        slots: its sources in the recipe's order; the base is among them if the recipe lists it.
        base: the base's slot, where the recipe has a base.
        settings: levels of shared parameters, innermost first.
        t: place in the slice, 0 to 1; 0 outside the layers.
    """

    name: str
    slots: tuple[Slot, ...]
    base: Slot | None
    settings: tuple[Settings, ...]
    t: float
    layer: int | None


@dataclass(frozen=True)
class Layout:
    """All targets; `layers` says where each output layer comes from if the stack is not the donor's own."""

    targets: tuple[Target, ...]
    layers: LayerOrigins | None = None


def lay_out_targets(recipe: Recipe, inputs: Inputs, problems: list[Problem]) -> Layout:
    if recipe.slices:
        return _slices(recipe, inputs, problems)
    return _models(recipe, inputs)


def _models(recipe: Recipe, inputs: Inputs) -> Layout:
    """Every tensor of the union, from every model under the same name."""
    base = None if recipe.base_model is None else inputs.place(recipe.base_model)
    targets = []
    for name in inputs.names():
        layer, t = _place(name, inputs.donor.stacks)
        slots = tuple(
            Slot(inputs.place(source.model), name, (source.parameters, recipe.parameters), source.statistics)
            for source in recipe.models
        )
        base_slot = None if base is None else Slot(base, name, (recipe.parameters,))
        targets.append(Target(name, slots, base_slot, (recipe.parameters,), t, layer))
    return Layout(tuple(targets))


def _place(name: str, stacks: Sequence[Stack]) -> tuple[int | None, float]:
    for stack in stacks:
        found = stack.layer(name)
        if found is not None:
            return found[0], gradient_place(found[0], stack.n_layers)
    return None, 0.0


def gradient_place(layer: int, n_layers: int) -> float:
    """t = i / (L - 1); a slice of one layer is at 1."""
    return layer / (n_layers - 1) if n_layers > 1 else 1.0


def _slices(recipe: Recipe, inputs: Inputs, problems: list[Problem]) -> Layout:
    problems += _slice_problems(recipe, inputs)
    if problems:
        return Layout(())
    stack = inputs.donor.main
    assert stack is not None
    targets: list[Target] = []
    origins: list[tuple[str, dict[str, Any], int]] = []
    for part in recipe.slices:
        for t, numbers in _layers(part):
            targets += _layer_targets(recipe, inputs, part, numbers, t, stack, len(origins))
            first = inputs.all[inputs.place(part.sources[0].model)]
            origins.append((first.checkpoint.path, first.config, numbers[0]))
    before, after = _outside(recipe, inputs)
    return Layout((*before, *targets, *after), origins)


def _slice_problems(recipe: Recipe, inputs: Inputs) -> Iterator[Problem]:
    bases = [(recipe.base_model, "base_model")]
    bases += [(part.base_model, f"slices.{number}.base_model") for number, part in enumerate(recipe.slices)]
    for base, key in bases:
        if base is not None and inputs.all[inputs.place(base)].main is None:
            yield Problem(f"{base.text} {_NO_LAYERS}", recipe.where(key))
    for number, part in enumerate(recipe.slices):
        where = f"{recipe.file}:{part.line}" if recipe.file else f"slice {number}"
        lengths = {}
        for source in part.sources:
            assert source.layer_range is not None
            start, end = source.layer_range
            lengths[f"{source.model.text} {start}-{end}"] = end - start
            stack = inputs.all[inputs.place(source.model)].main
            if stack is None:
                yield Problem(f"{source.model.text} {_NO_LAYERS}", where)
            elif end > stack.n_layers:
                yield Problem(
                    f"layer_range [{start}, {end}] ends behind the last layer: {source.model.text} has "
                    f"{stack.n_layers} layers ({stack.prefix}0 to {stack.n_layers - 1}).",
                    f"{recipe.file}:{source.line}" if recipe.file else where,
                    f"The largest end is {stack.n_layers}.",
                )
        if len(set(lengths.values())) > 1:
            found = ", ".join(f"{name}: {n} layers" for name, n in lengths.items())
            yield Problem(f"the sources of a slice differ in length ({found})", where)


_NO_LAYERS = 'has no stack of layers that its config confirms; merge it whole, with "models" in place of "slices".'


def _layers(part: Slice) -> Iterator[tuple[float, tuple[int, ...]]]:
    """(t, layer number in each source) for every layer of a slice."""
    ranges = [range(*source.layer_range) for source in part.sources if source.layer_range is not None]
    for i, numbers in enumerate(zip(*ranges, strict=True)):
        yield gradient_place(i, len(ranges[0])), numbers


def _layer_targets(
    recipe: Recipe, inputs: Inputs, part: Slice, numbers: tuple[int, ...], t: float, stack: Stack, out_layer: int
) -> Iterator[Target]:
    """The tensors of one output layer: the union of what its sources have in theirs."""
    suffixes: dict[str, None] = {}
    places = [inputs.place(source.model) for source in part.sources]
    for place, number in zip(places, numbers, strict=True):
        model = inputs.all[place]
        suffixes.update(dict.fromkeys(_suffixes(model.tensors, model.main, number)))
    base = _base_layer(recipe, inputs, part, numbers)
    shared = (part.parameters, recipe.parameters)
    for suffix in suffixes:
        slots = tuple(
            Slot(place, _layer_name(inputs, place, number, suffix), (source.parameters, *shared), source.statistics)
            for source, place, number in zip(part.sources, places, numbers, strict=True)
        )
        base_slot = None if base is None else Slot(base[0], _layer_name(inputs, *base, suffix), shared)
        yield Target(stack.name(out_layer, suffix), slots, base_slot, shared, t, out_layer)


def _base_layer(recipe: Recipe, inputs: Inputs, part: Slice, numbers: tuple[int, ...]) -> tuple[int, int] | None:
    """(model, layer) of the base in a slice: its own range if it is listed, else that of the first source."""
    ref = _slice_base(recipe, part)
    if ref is None:
        return None
    base = inputs.place(ref)
    own = [n for source, n in zip(part.sources, numbers, strict=True) if inputs.place(source.model) == base]
    return base, (own or list(numbers))[0]


def _slice_base(recipe: Recipe, part: Slice) -> ModelRef | None:
    return part.base_model or recipe.base_model


def _suffixes(names: Mapping[str, object], stack: Stack | None, number: int) -> Iterator[str]:
    assert stack is not None
    for name in names:
        found = stack.layer(name)
        if found is not None and found[0] == number:
            yield found[1]


def _layer_name(inputs: Inputs, model: int, number: int, suffix: str) -> str:
    stack = inputs.all[model].main
    assert stack is not None
    return stack.name(number, suffix)


def _outside(recipe: Recipe, inputs: Inputs) -> tuple[list[Target], list[Target]]:
    """Tensors outside the stack: embeddings with the first slice's sources, norm and head with the last one's."""
    before: list[Target] = []
    after: list[Target] = []
    for name in inputs.names():
        if any(model.main is not None and model.main.layer(name) for model in inputs.all):
            continue
        early = is_input_side(name)
        part = recipe.slices[0 if early else -1]
        shared = (part.parameters, recipe.parameters)
        slots = tuple(_outside_slot(inputs, source, name, shared) for source in part.sources)
        ref = _slice_base(recipe, part)
        base = None if ref is None else Slot(inputs.place(ref), name, shared)
        (before if early else after).append(Target(name, slots, base, shared, 0.0, None))
    return before, after


def _outside_slot(inputs: Inputs, source: Source, name: str, shared: tuple[Settings, ...]) -> Slot:
    return Slot(inputs.place(source.model), name, (source.parameters, *shared), source.statistics)
