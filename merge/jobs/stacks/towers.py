"""The targets of a recipe: of one list of models or slices, or of several, each for a tower of the model."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

from merge.errors import Problem
from merge.jobs.stacks.modules import (
    DECODER,
    DEFAULT,
    ENCODER,
    SIDE_MODULES,
    Chosen,
    inputs_modules,
    modules_of,
    side_modules,
)
from merge.jobs.stacks.slices import slice_targets
from merge.methods import known_method
from merge.output.layers import Restacked
from merge.planned import Planned, Said
from merge.planning.inputs import Inputs
from merge.planning.targets import Layout, Slot, Target, Tower, place_of
from merge.quoting import counted
from merge.recipe.model import Module, Recipe


def lay_out_targets(recipe: Recipe, inputs: Inputs) -> Planned[Layout]:
    if recipe.modules:
        return _modules(recipe, inputs)
    if (found := list(_towers_beside_the_donor(recipe, inputs))) and "missing_tensors" not in recipe.allow:
        return Planned(Layout(()), tuple(found))
    tower = Tower(
        *("", DEFAULT, recipe.models, recipe.slices, recipe.merge_method, (recipe.parameters,)),
        owns=lambda name: True,
        stack=lambda model: model.main,
    )
    if not recipe.slices:
        targets = _with_lacking(inputs, _model_targets(recipe, inputs, tower))
        return Planned(Layout(targets.value), notes=targets.notes)
    modules = inputs_modules(inputs).found
    if ENCODER in modules and DECODER in modules:
        message = f'{inputs.donor.ref.text} has several stacks of layers; say which ones by "modules": encoder, decoder'
        return Planned(Layout(()), (Problem(message, recipe.where("slices")),))
    said = Said()
    layout = said.take(slice_targets(recipe, inputs, tower))
    return said.with_value(Layout(said.take(_with_lacking(inputs, layout.targets)), layout.stacks))


def _modules(recipe: Recipe, inputs: Inputs) -> Planned[Layout]:
    """The towers that the recipe lists; all other tensors are copied from the donor."""
    chosen, said = Chosen(recipe, inputs), Said()
    said.problems += chosen.problems
    targets: dict[str, Target] = {}
    stacks: tuple[Restacked, ...] = ()
    for key, module in recipe.modules.items():
        tower = _tower(recipe, key, module, chosen)
        made = (
            Layout(_model_targets(recipe, inputs, tower))
            if module.models
            else said.take(slice_targets(recipe, inputs, tower))
        )
        if not made.targets and not said.problems:
            message = f'module "{key}" has no tensors in the models that it lists'
            said.problems.append(Problem(message, recipe.where(f"modules.{key}")))
        targets.update((target.name, target) for target in made.targets)
        stacks += made.stacks
    if said.problems:
        return said.with_value(Layout(()))
    copied: Counter[str] = Counter()
    sorter = inputs_modules(inputs)
    for name in inputs.donor.tensors:
        if chosen.key_of(name) is None or name in inputs.copied:
            targets[name] = _copy(inputs, name)
            copied[sorter.of(name)] += 1
    if copied:
        listed = ", ".join(f"{module} ({counted(count, 'tensor')})" for module, count in copied.items())
        said.notes.append(f"not among the modules, copied from {inputs.donor.ref.text}: {listed}")
    order = {name: place for place, name in enumerate(inputs.names)}
    ordered = sorted(targets.values(), key=lambda target: order.get(target.name, len(order)))
    return said.with_value(Layout(tuple(ordered), stacks))


def _model_targets(recipe: Recipe, inputs: Inputs, tower: Tower) -> tuple[Target, ...]:
    """Every tensor of the union, from every model under the same name."""
    base = None if recipe.base_model is None else inputs.place(recipe.base_model)
    places = {inputs.place(source.model) for source in tower.models} | ({base} if base is not None else set())
    sources = [
        (inputs.place(source.model), (source.parameters, *tower.settings), source.statistics) for source in tower.models
    ]
    stored = {name for place in places for name in inputs.all[place].tensors}
    targets = []
    for name in inputs.names:
        if name not in stored or not tower.owns(name):
            continue
        layer, t = place_of(name, inputs.donor.stacks)
        slots = tuple(Slot(place, name, settings, statistics) for place, settings, statistics in sources)
        base_slot = None if base is None else Slot(base, name, tower.settings)
        targets.append(Target(name, slots, base_slot, tower.settings, t, layer, tower.method))
    return tuple(targets)


def _tower(recipe: Recipe, key: str, module: Module, chosen: Chosen) -> Tower:
    return Tower(
        path=f"modules.{key}.",
        kind=chosen.kind(key),
        models=module.models,
        slices=module.slices,
        method=module.merge_method or recipe.merge_method,
        settings=(module.parameters, recipe.parameters),
        owns=lambda name: chosen.key_of(name) == key,
        stack=lambda model: chosen.stack(key, model),
    )


def _copy(inputs: Inputs, name: str) -> Target:
    """A tensor of the donor as it is."""
    layer, t = place_of(name, inputs.donor.stacks)
    return Target(name, (Slot(0, name, ()),), None, (), t, layer, "passthrough")


def _towers_beside_the_donor(recipe: Recipe, inputs: Inputs) -> Iterator[Problem]:
    """Towers of an input that the donor of the config lacks; the result cannot hold them."""
    known = inputs_modules(inputs).found
    for model in inputs.all[1:]:
        found = modules_of(tuple(model.tensors)).found
        more = [module for module in found if module in SIDE_MODULES and module not in known]
        if more:
            donor = inputs.donor.ref.text
            message = f"{model.ref.text} has a {' and a '.join(more)}, and {donor}, which gives config.json, has none."
            where = recipe.where("base_model" if recipe.base_model else "models")
            yield Problem(message, where, "Name the model that has it as base_model, or list it first.")


def _with_lacking(inputs: Inputs, targets: tuple[Target, ...]) -> Planned[tuple[Target, ...]]:
    """A tower that the donor has and plain language models have not is merged from the models that have it, if any."""
    targets = tuple(_copy(inputs, target.name) if target.name in inputs.copied else target for target in targets)
    lacking = side_modules(inputs)
    if not lacking:
        return Planned(targets)
    sorter = inputs_modules(inputs)
    notes = []
    for name, without in lacking.items():
        names = ", ".join(inputs.all[i].ref.text for i in sorted(without))
        how = "copied" if len(inputs.all) - len(without) < 2 else "merged from those that have it"
        notes.append(f"{names}: no {name}; it is {how}")
    left = tuple(
        _without(inputs, target, lacking[module]) if (module := sorter.of(target.name)) in lacking else target
        for target in targets
    )
    return Planned(left, notes=tuple(notes))


def _without(inputs: Inputs, target: Target, without: frozenset[int]) -> Target:
    slots = tuple(slot for slot in target.slots if slot.model not in without)
    method = known_method(target.method)
    base = target.base
    inputs_left = [slot for slot in slots if not (method.base_apart and base is not None and slot.model == base.model)]
    models = {slot.model for slot in (*slots, *([base] if base is not None else []))} - without
    too_few = len(models) < 2 or len(inputs_left) < method.n_models[0]
    return _copy(inputs, target.name) if too_few else target._replace(slots=slots)
