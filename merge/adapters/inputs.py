"""Opens the adapters of a recipe, and checks that they can be combined: kinds, bases, methods for adapters."""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass

from merge.adapters.files import Adapter, is_adapter, open_adapter
from merge.adapters.fold import open_model
from merge.checkpoint import Checkpoint
from merge.dtypes import DTYPES
from merge.errors import CheckpointError, Problem
from merge.methods import Method, all_methods
from merge.methods.registry import OUTPUT_RANK
from merge.plan import SourceModel
from merge.quoting import some
from merge.recipe.model import ModelRef, Recipe, Source
from merge.recipe.settings import resolve

FOLD = "Fold it: list BASE+ADAPTER in a recipe of models, and make an adapter of the result with `merge lora extract`."


@dataclass(frozen=True)
class AdapterInputs:
    """The adapters, each once, and the adapter of each source of the recipe."""

    adapters: tuple[Adapter, ...]
    sources: tuple[Source, ...]
    places: tuple[int, ...]  # of each source, in `adapters`
    base: Checkpoint | None

    def listed(self) -> list[tuple[Source, Adapter]]:
        return [(source, self.adapters[place]) for source, place in zip(self.sources, self.places, strict=True)]

    def models(self) -> tuple[SourceModel, ...]:
        both: list[Checkpoint | Adapter] = [*([self.base] if self.base else []), *self.adapters]
        return tuple(SourceModel(one.ref.text, one.path, one.revision, one.files) for one in both)

    def model(self, place: int) -> int:
        """Index in Plan.models of a source."""
        return self.places[place] + (self.base is not None)

    def base_name(self) -> str | None:
        """The base's name in the adapters, else in the recipe."""
        named = dict.fromkeys(adapter.base_name for adapter in self.adapters if adapter.base_name)
        if len(named) != 1 and self.base is not None:
            return self.base.ref.path
        return next(iter(named), None)

    def notes(self) -> list[str]:
        return [note for one in (self.base, *self.adapters) if one is not None for note in one.notes]


def open_inputs(recipe: Recipe) -> AdapterInputs:
    """Opens all adapters, and reports every one that cannot be opened.

    Raises:
        CheckpointError: an adapter, or the base that the recipe names, cannot be opened.
    """
    sources = [source for source in recipe.models if source.model != recipe.base_model]
    opened: dict[tuple[str, str | None], Adapter] = {}
    failures: list[CheckpointError] = []
    for source in sources:
        key = source.model.path, source.model.revision
        if key not in opened:
            try:
                opened[key] = open_adapter(source.model)
            except CheckpointError as error:
                failures.append(error)
    base = None
    try:
        base = None if recipe.base_model is None else open_model(recipe.base_model)
    except CheckpointError as error:
        failures.append(error)
    if failures:
        raise CheckpointError("\n".join(dict.fromkeys(str(error) for error in failures))) from failures[0]
    order = list(opened)
    places = tuple(order.index((source.model.path, source.model.revision)) for source in sources)
    return AdapterInputs(tuple(opened.values()), tuple(sources), places, base)


def unfit(recipe: Recipe, method: Method) -> Iterable[Problem]:
    """Problems with settings that are valid for models and not for adapters."""
    if not method.takes_adapters:
        known = ", ".join(name for name, other in all_methods().items() if other.takes_adapters)
        said = f"{method.name} does not merge LoRA adapters, and all models of this recipe are adapters."
        hint = f"These do: {known}. To merge whole models, list BASE+ADAPTER."
        yield Problem(said, recipe.where("merge_method"), hint)
    if (
        method.on_factors
        and method.base_is_input
        and any(source.model == recipe.base_model for source in recipe.models)
    ):
        said = "the base is listed with a weight, but it is not an adapter."
        yield Problem(said, recipe.where("models"), 'Take it out, and set "normalize: false" to scale by the weights.')
    for key, value in (
        ("align", recipe.align),
        ("tokenizer", recipe.tokenizer),
        ("tokenizer_source", recipe.tokenizer_source),
        ("chat_template", recipe.chat_template),
    ):
        if value is not None:
            yield Problem(f'"{key}" is for whole models; an adapter has none.', recipe.where(key), "Remove it.")
    if (look := method.model_pass) is not None and look.key in recipe.parameters:
        key = look.key
        if method.looks_at_model({key: resolve((recipe.parameters,), key, "", 0.0)}):
            lacking = "which adapters merged module by module lack."
            said = f'"{key}: {look.value}" needs one threshold for all of a model, {lacking}'
            yield Problem(said, recipe.where(f"parameters.{key}"), f"Use {key}: tensor.")
    if method.on_factors and method.on_factors.rank == "all" and OUTPUT_RANK.name in recipe.parameters:
        said = f"{method.name} keeps all of the adapters, and its rank is the sum of theirs."
        yield Problem(said, recipe.where("parameters.rank"), 'Remove "rank", or use svd.')


def unlike(recipe: Recipe, inputs: AdapterInputs) -> Iterable[Problem]:
    """Problems of adapters that are not plain LoRA, or not of one base."""
    for source, adapter in dict(zip(inputs.places, inputs.listed(), strict=True)).values():
        name, where = source.model.text, _line(recipe, source)
        if adapter.others:
            said = (
                f"{name} is a {adapter.kind} adapter, whose changes are not B A of a low rank and cannot be added here."
            )
            yield Problem(said, where, FOLD)
        if adapter.parameters:
            owners = some([factors.module for factors in adapter.parameters.values()])
            said = f"{name} changes parameters that are not a module's weight ({owners}; target_parameters)."
            yield Problem(said, where, FOLD)
        dora = [module.name for module in adapter.modules.values() if module.magnitude is not None]
        if dora:
            said = f"{name} is a DoRA adapter ({some(dora)}), whose change depends on the base's weights and cannot be"
            yield Problem(f"{said} added to others.", where, FOLD)
        if adapter.tokens:
            said = (
                f"{name} replaces rows of {some(list(adapter.tokens))} (trainable_token_indices), which is not a change"
            )
            yield Problem(f"{said} that could be added to others.", where, FOLD)
        for module in adapter.modules.values():
            wrong = [ref for ref in (module.a, module.b) if not DTYPES[ref.dtype].is_float or ref.dtype == "F64"]
            if wrong:
                said = f"{name}: {wrong[0].name} is stored as {wrong[0].dtype}; factors must be float32 or narrower."
                yield Problem(said, where, "Save the adapter in float32.")
                break
    bases = {_resolved(adapter.base_name): adapter for adapter in inputs.adapters if adapter.base_name}
    if len(bases) > 1 and "different_bases" not in recipe.allow:
        found = ", ".join(f"{adapter.ref.text}: {adapter.base_name}" for adapter in bases.values())
        hint = 'Set "allow: [different_bases]" if they are copies of one model.'
        yield Problem(f"the adapters were trained on different bases ({found}).", recipe.where("models"), hint)


def _resolved(name: str | None) -> str:
    return os.path.realpath(name) if name and os.path.isdir(name) else (name or "").rstrip("/")


def refused_models(recipe: Recipe, method: Method) -> list[Problem]:
    """Problems of a recipe of models with settings for adapters only, or with some adapters among its models."""
    problems = []
    lone = [source for source in recipe.models if os.path.isdir(source.model.path) and _is_lone(source.model)]
    for source in lone:
        hint = f'Write "BASE+{source.model.text}" to merge the model that it makes of its base.'
        said = f"{source.model.text} is a LoRA adapter, and not all of the recipe's models are."
        problems.append(Problem(said, _line(recipe, source), hint))
    if method.inputs == "adapters" and not lone:
        first = next((source.model.text for source in recipe.models), "a slice")
        said = f"{method.name} merges LoRA adapters, and {first} is not one."
        problems.append(Problem(said, recipe.where("merge_method"), "For models see linear and task_arithmetic."))
    levels = (recipe.parameters, *(part.parameters for part in recipe.slices))
    if method.parameter(OUTPUT_RANK.name) is None and any(OUTPUT_RANK.name in level for level in levels):
        said = '"rank" is that of a resulting adapter, and this recipe merges whole models.'
        problems.append(Problem(said, recipe.where("parameters.rank"), "Remove it."))
    return problems


def _is_lone(ref: ModelRef) -> bool:
    return ref.adapter is None and is_adapter(ref.path)


def _line(recipe: Recipe, source: Source) -> str | None:
    return f"{recipe.file}:{source.line}" if recipe.file and source.line else recipe.file
