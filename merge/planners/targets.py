"""Which source tensors go into which output tensor: whole models, and slices of layers stacked on each other."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from merge.architecture import Stack, is_input_side
from merge.errors import Problem
from merge.output.layers import Restacked
from merge.planners.inputs import Input, Inputs
from merge.planners.usage import usage_notes
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
        method: name of its merge method: the slice's, the module's or the recipe's.
    """

    name: str
    slots: tuple[Slot, ...]
    base: Slot | None
    settings: tuple[Settings, ...]
    t: float
    layer: int | None
    method: str


@dataclass(frozen=True)
class Layout:
    """All targets; `stacks` says where each output layer comes from, for stacks that are not the donor's own."""

    targets: tuple[Target, ...]
    stacks: tuple[Restacked, ...] = ()


@dataclass(frozen=True)
class Tower:
    """What one list of models or slices makes: the whole output, or a module of it.

    Attributes:
        path: in front of "slices.0" in Recipe.lines: "" or "modules.NAME.".
        kind: the module's name in merge.planners.modules, by which the config is found.
        settings: levels of shared parameters outside the slices, innermost first.
        owns: whether a tensor belongs to it.
        stack: its layers in one of the inputs.
    """

    path: str
    kind: str
    models: tuple[Source, ...]
    slices: tuple[Slice, ...]
    method: str
    settings: tuple[Settings, ...]
    owns: Callable[[str], bool]
    stack: Callable[[Input], Stack | None]


def model_targets(recipe: Recipe, inputs: Inputs, tower: Tower) -> tuple[Target, ...]:
    """Every tensor of the union, from every model under the same name."""
    base = None if recipe.base_model is None else inputs.place(recipe.base_model)
    places = {inputs.place(source.model) for source in tower.models} | ({base} if base is not None else set())
    targets = []
    for name in inputs.names():
        if not tower.owns(name) or not any(name in inputs.all[place].tensors for place in places if place is not None):
            continue
        layer, t = place_of(name, inputs.donor.stacks)
        slots = tuple(
            Slot(inputs.place(source.model), name, (source.parameters, *tower.settings), source.statistics)
            for source in tower.models
        )
        base_slot = None if base is None else Slot(base, name, tower.settings)
        targets.append(Target(name, slots, base_slot, tower.settings, t, layer, tower.method))
    return tuple(targets)


def place_of(name: str, stacks: Sequence[Stack]) -> tuple[int | None, float]:
    """(layer, its place t) of a tensor; (None, 0) outside the layers."""
    for stack in stacks:
        found = stack.layer(name)
        if found is not None:
            return found[0], gradient_place(found[0], stack.n_layers)
    return None, 0.0


def gradient_place(layer: int, n_layers: int) -> float:
    """t = i / (L - 1); a slice of one layer is at 1."""
    return layer / (n_layers - 1) if n_layers > 1 else 1.0


def slice_targets(recipe: Recipe, inputs: Inputs, tower: Tower, problems: list[Problem]) -> Layout:
    found = list(_slice_problems(recipe, inputs, tower))
    problems += found
    stack = tower.stack(inputs.donor)
    if found or stack is None:
        return Layout(())
    targets: list[Target] = []
    origins: list[tuple[str, dict[str, Any], int]] = []
    for number, part in enumerate(tower.slices):
        if not any(_layers(part)):
            inputs.notes.append(_without_layers(number, len(tower.slices)))
        for t, numbers in _layers(part):
            targets += _layer_targets(recipe, inputs, tower, part, numbers, t, stack, len(origins))
            first = inputs.all[inputs.place(part.sources[0].model)]
            origins.append((first.checkpoint.path, first.config, numbers[0]))
    before, after = _outside(recipe, inputs, tower)
    lengths = {i: its.n_layers for i, model in enumerate(inputs.all) if (its := tower.stack(model)) is not None}
    inputs.notes += usage_notes(inputs, tower.slices, lengths)
    return Layout((*before, *targets, *after), (Restacked(tower.kind, stack.n_layers, origins),))


def _without_layers(number: int, n_slices: int) -> str:
    side = "before" if number == 0 else "after" if number == n_slices - 1 else ""
    gives = f"it gives what stands {side} the layers" if side else "it has no effect"
    return f"slice {number + 1} holds no layer; {gives}"


def _slice_problems(recipe: Recipe, inputs: Inputs, tower: Tower) -> Iterator[Problem]:
    bases = [(recipe.base_model, "base_model")]
    bases += [(part.base_model, f"{tower.path}slices.{i}.base_model") for i, part in enumerate(tower.slices)]
    for base, key in bases:
        if base is not None and tower.stack(inputs.all[inputs.place(base)]) is None:
            yield Problem(f"{base.text} {_NO_LAYERS}", recipe.where(key))
    for number, part in enumerate(tower.slices):
        where = f"{recipe.file}:{part.line}" if recipe.file else f"slice {number}"
        lengths = {}
        for source in part.sources:
            assert source.layer_range is not None
            start, end = source.layer_range
            lengths[f"{source.model.text} {start}-{end}"] = end - start
            stack = tower.stack(inputs.all[inputs.place(source.model)])
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
    recipe: Recipe,
    inputs: Inputs,
    tower: Tower,
    part: Slice,
    numbers: tuple[int, ...],
    t: float,
    stack: Stack,
    out_layer: int,
) -> Iterator[Target]:
    """The tensors of one output layer: the union of what its sources have in theirs."""
    suffixes: dict[str, None] = {}
    places = [inputs.place(source.model) for source in part.sources]
    stacks = [_stack(tower, inputs, place) for place in places]
    for place, its, number in zip(places, stacks, numbers, strict=True):
        suffixes.update(dict.fromkeys(inputs.suffixes(place, its, number)))
    base = _base_layer(recipe, inputs, part, numbers)
    shared = (part.parameters, *tower.settings)
    method = part.merge_method or tower.method
    for suffix in suffixes:
        slots = tuple(
            Slot(place, its.name(number, suffix), (source.parameters, *shared), source.statistics)
            for source, place, its, number in zip(part.sources, places, stacks, numbers, strict=True)
        )
        base_slot = None
        if base is not None:
            base_slot = Slot(base[0], _stack(tower, inputs, base[0]).name(base[1], suffix), shared)
        yield Target(stack.name(out_layer, suffix), slots, base_slot, shared, t, out_layer, method)


def _stack(tower: Tower, inputs: Inputs, place: int) -> Stack:
    stack = tower.stack(inputs.all[place])
    assert stack is not None  # else a problem was found before
    return stack


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


def _outside(recipe: Recipe, inputs: Inputs, tower: Tower) -> tuple[list[Target], list[Target]]:
    """Tensors outside the stack: embeddings with the first slice's sources, norm and head with the last one's."""
    before: list[Target] = []
    after: list[Target] = []
    stacks = [stack for model in inputs.all if (stack := tower.stack(model)) is not None]
    for name in inputs.names():
        if not tower.owns(name) or any(stack.layer(name) for stack in stacks):
            continue
        early = is_input_side(name)
        part = tower.slices[0 if early else -1]
        shared = (part.parameters, *tower.settings)
        slots = tuple(_outside_slot(inputs, source, name, shared) for source in part.sources)
        ref = _slice_base(recipe, part)
        base = None if ref is None else Slot(inputs.place(ref), name, shared)
        method = part.merge_method or tower.method
        (before if early else after).append(Target(name, slots, base, shared, 0.0, None, method))
    return before, after


def _outside_slot(inputs: Inputs, source: Source, name: str, shared: tuple[Settings, ...]) -> Slot:
    return Slot(inputs.place(source.model), name, (source.parameters, *shared), source.statistics)
