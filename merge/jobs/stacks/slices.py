"""Targets of slices: stacked layers, and the tensors before, after and beside them."""

from __future__ import annotations

from collections.abc import Container, Iterator

from merge.architecture import Stack, is_input_side, layer_counts
from merge.errors import Problem
from merge.jobs.stacks.first_layer import FirstLayer
from merge.jobs.stacks.layer_parts import StackedLayer, divided_tensors, part_targets
from merge.jobs.stacks.usage import usage_notes
from merge.output.layers import Restacked
from merge.planned import Planned, Said
from merge.planning.inputs import Input, Inputs
from merge.planning.targets import Layout, Slot, Target, Tower, gradient_place
from merge.quoting import some
from merge.recipe.model import ModelRef, Recipe, Settings, Slice, Source


def slice_targets(recipe: Recipe, inputs: Inputs, tower: Tower) -> Planned[Layout]:
    said = Said()
    said.problems += _slice_problems(recipe, inputs, tower)
    stack = tower.stack(inputs.donor)
    if said.problems or stack is None:
        return said.with_value(Layout(()))
    first_layer = FirstLayer(inputs.donor, stack)
    targets: list[Target] = []
    layers: list[StackedLayer] = []
    for number, part in enumerate(tower.slices):
        if not any(_layers(part)):
            said.notes.append(_without_layers(number, len(tower.slices)))
        for t, numbers in _layers(part):
            said.problems += first_layer.problems(len(layers), numbers, recipe.where("slices"))
            layer = StackedLayer(part, numbers, _base_layer(recipe, inputs, part, numbers))
            targets += _layer_targets(inputs, tower, layer, t, stack, len(layers), first_layer)
            layers.append(layer)
    divided = divided_tensors(inputs, tower)
    beside: list[Target] = []
    for made in part_targets(recipe, inputs, tower, layers, divided):
        said.problems.append(made) if isinstance(made, Problem) else beside.append(made)
    before, after = said.take(_outside(recipe, inputs, tower, divided))
    lengths = {i: its.n_layers for i, model in enumerate(inputs.all) if (its := tower.stack(model)) is not None}
    said.notes += usage_notes(inputs, tower.slices, lengths)
    origins = [_origin(inputs, layer) for layer in layers]
    stacks = (Restacked(tower.kind, stack.n_layers, origins),)
    return said.with_value(Layout((*before, *beside, *targets, *after), stacks))


def _origin(inputs: Inputs, layer: StackedLayer) -> tuple[str, dict[str, object], int]:
    first = inputs.all[inputs.place(layer.part.sources[0].model)]
    return first.checkpoint.path, first.config, layer.numbers[0]


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
            model = inputs.all[inputs.place(source.model)]
            stack = tower.stack(model)
            if stack is None:
                yield Problem(f"{source.model.text} {_NO_LAYERS}", where)
            elif (why_not := _no_stack(model, tower, stack)) is not None:
                yield Problem(f"{source.model.text}: {why_not}, which cannot be stacked.", where, _WHOLE)
            elif end > stack.n_layers:
                yield Problem(
                    f"layer_range [{start}, {end}] ends after the last layer: {source.model.text} has "
                    f"{stack.n_layers} layers ({stack.prefix}0 to {stack.n_layers - 1}).",
                    f"{recipe.file}:{source.line}" if recipe.file else where,
                    f"The largest end is {stack.n_layers}.",
                )
        if len(set(lengths.values())) > 1:
            found = ", ".join(f"{name}: {n} layers" for name, n in lengths.items())
            yield Problem(f"the sources of a slice differ in length ({found})", where)


_WHOLE = 'Merge it whole, with "models" in place of "slices".'
_NO_LAYERS = 'has no stack of layers that its config confirms; merge it whole, with "models" in place of "slices".'


def _no_stack(model: Input, tower: Tower, stack: Stack) -> str | None:
    """Why a run of numbered names is not a stack of layers."""
    counts = layer_counts(model.config)
    if counts and stack.n_layers not in counts:
        return f"config.json declares {max(counts)} layers, and {stack.prefix} holds {stack.n_layers} for all of them"
    known = model.architecture.stacks
    own = [each for each in model.stacks if tower.owns(each.name(0, "")) and _loaded_prefix(model, each) in known]
    lists = [each.prefix for each in own]
    if len(lists) > 1:
        return f"the parts of one layer are in several lists ({some(lists, 4)})"
    return None


def _loaded_prefix(model: Input, stack: Stack) -> str:
    return model.architecture.loaded_name(stack.name(0, "weight")).removesuffix("0.weight")


def _layers(part: Slice) -> Iterator[tuple[float, tuple[int, ...]]]:
    """(t, layer number in each source) for every layer of a slice."""
    ranges = [range(*source.layer_range) for source in part.sources if source.layer_range is not None]
    for i, numbers in enumerate(zip(*ranges, strict=True)):
        yield gradient_place(i, len(ranges[0])), numbers


def _layer_targets(
    inputs: Inputs, tower: Tower, layer: StackedLayer, t: float, stack: Stack, out_layer: int, first_layer: FirstLayer
) -> Iterator[Target]:
    """The tensors of one output layer: the union of its sources' layers."""
    part, numbers = layer.part, layer.numbers
    suffixes = dict.fromkeys(first_layer.more) if out_layer == 0 else {}
    places = [inputs.place(source.model) for source in part.sources]
    stacks = [_stack(tower, inputs, place) for place in places]
    for place, its, number in zip(places, stacks, numbers, strict=True):
        suffixes.update(dict.fromkeys(inputs.suffixes(place, its, number)))
    base = layer.base
    shared = (part.parameters, *tower.settings)
    method = part.merge_method or tower.method
    for suffix in suffixes:
        taken = [first_layer.taken_from(suffix, out_layer, number) for number in numbers]
        slots = tuple(
            Slot(place, its.name(number, suffix), (source.parameters, *shared), source.statistics)
            for source, place, its, number in zip(part.sources, places, stacks, taken, strict=True)
            if number is not None
        )
        if not slots:
            continue
        base_slot = None
        if base is not None:
            base_layer = first_layer.taken_from(suffix, out_layer, base[1]) or 0
            base_slot = Slot(base[0], _stack(tower, inputs, base[0]).name(base_layer, suffix), shared)
        yield Target(stack.name(out_layer, suffix), slots, base_slot, shared, t, out_layer, method)


def _stack(tower: Tower, inputs: Inputs, place: int) -> Stack:
    stack = tower.stack(inputs.all[place])
    assert stack is not None  # otherwise a problem was reported before
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


def _outside(
    recipe: Recipe, inputs: Inputs, tower: Tower, divided: Container[str]
) -> Planned[tuple[list[Target], list[Target]]]:
    """Tensors outside the stack: embeddings with the first slice's sources, norm and head with the last one's."""
    before: list[Target] = []
    after: list[Target] = []
    stacks = [stack for model in inputs.all if (stack := tower.stack(model)) is not None]
    beyond: list[str] = []
    for name in inputs.names:
        if not tower.owns(name) or name in divided or any(stack.layer(name) for stack in stacks):
            continue
        if any(stack.is_beyond(name) for stack in stacks) or name in inputs.copied:
            beyond.append(name)
            continue
        early = is_input_side(name)
        part = tower.slices[0 if early else -1]
        shared = (part.parameters, *tower.settings)
        slots = tuple(_outside_slot(inputs, source, name, shared) for source in part.sources)
        ref = _slice_base(recipe, part)
        base = None if ref is None else Slot(inputs.place(ref), name, shared)
        method = part.merge_method or tower.method
        (before if early else after).append(Target(name, slots, base, shared, 0.0, None, method))
    left_out = (f"{some(beyond)}: left out: not among the layers that are stacked",) if beyond else ()
    return Planned((before, after), notes=left_out)


def _outside_slot(inputs: Inputs, source: Source, name: str, shared: tuple[Settings, ...]) -> Slot:
    return Slot(inputs.place(source.model), name, (source.parameters, *shared), source.statistics)
