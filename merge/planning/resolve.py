"""Draft -> Recipe: locates its models on the disk and the hub.

References become directories or hub ids. Then checks run that depend on them: which models are the same, and which are
adapters. No model is opened here; models.py does that.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterable, Mapping
from typing import Any, TypeVar

from merge.errors import RecipeError
from merge.methods.registry import Method, all_methods
from merge.planning.kind import are_adapters, is_adapter_ref
from merge.quoting import quoted
from merge.recipe.build import Draft
from merge.recipe.check import check, check_attention
from merge.recipe.fields import is_file_name
from merge.recipe.mentioned import mentioned
from merge.recipe.model import ModelRef, Module, Recipe, Source
from merge.recipe.reader import UNREADABLE, RecipeReader
from merge.recipe.references import NO_ADAPTER, STAGE, parse_model_path, parse_reference
from merge.recipe.text import text_of
from merge.schema.names import suggest

T = TypeVar("T")


def resolve(draft: Draft, given: Mapping[str, bool] | None = None) -> Recipe:
    """The recipe with its models located.

    Args:
        given: names of models that do not exist yet, and whether each will be an adapter.

    Raises:
        RecipeError: with every problem of the recipe, in its order. If there is one, models on the disk are opened too,
            so that their problems are reported at the same time.
    """
    reader = draft.reader
    disk = _Disk(reader, given or {})
    recipe: Recipe = disk.located(draft.recipe)
    if recipe.mixture is None:
        recipe = _with_bases(reader, disk, recipe)
    recipe = _with_donors(reader, disk, recipe)
    if recipe.mixture is None:
        check(reader, recipe, disk.are_adapters)
    else:
        check_attention(reader, recipe)
    if reader.n_problems and not given:
        from merge.planning.models import problems_of_models

        reader.add(problems_of_models(recipe))
    reader.raise_if_any()
    return recipe


def made_recipe(recipe: Recipe) -> Recipe:
    """Resolves a recipe that a command makes of its arguments, and adds the equivalent text.

    Raises:
        RecipeError: as for `resolve`; problems name no line.
    """
    reader = RecipeReader(None, all_methods())
    reader.method = reader.methods[recipe.merge_method]
    reader.in_use = (reader.method,)
    if recipe.name is not None and not is_file_name(recipe.name):
        reader.problem(0, f'"name" must be usable as the name of a directory, not {quoted(recipe.name)}')
    try:
        return resolve(Draft(dataclasses.replace(recipe, text=recipe.text + text_of(recipe)), reader))
    except RecipeError as error:
        raise RecipeError([dataclasses.replace(problem, where=None) for problem in error.problems]) from None


def reference(text: str) -> ModelRef:
    """A model argument of a command, to be located by `made_recipe`."""
    return ModelRef(text, text, written="reference")


class _Disk:
    """Locates the models of one recipe, and remembers which are adapters."""

    def __init__(self, reader: RecipeReader, given: Mapping[str, bool]) -> None:
        self._reader, self._given = reader, given
        self._adapters: dict[ModelRef, bool] = {}

    def located(self, part: T) -> T:
        """A part of a recipe with all its references located; problems go to the reader."""
        changed: Any = part
        if isinstance(part, ModelRef):
            changed = self.model(part)
        elif isinstance(part, tuple):
            changed = tuple(map(self.located, part))
        elif isinstance(part, Mapping):
            changed = {key: self.located(value) for key, value in part.items()}
        elif dataclasses.is_dataclass(part) and not isinstance(part, type):
            values = {each.name: self.located(getattr(part, each.name)) for each in dataclasses.fields(part)}
            if values.get("statistics") is not None:
                values["statistics"] = self._file(values["statistics"])
            changed = dataclasses.replace(part, **values)
        found: T = changed
        return found

    def model(self, ref: ModelRef) -> ModelRef:
        try:
            return self._model(ref)
        except ValueError as error:
            self._reader.problem(ref.line, str(error))
            return UNREADABLE

    def _model(self, ref: ModelRef) -> ModelRef:
        """Raises ValueError with the short cause."""
        folder = self._reader.folder
        if not ref.written or ref.path in self._given:
            return ref
        stage = self._reader.stages.find(ref.path, folder) if ref.revision is None else None
        if ref.written == "reference":
            return stage or parse_reference(ref.text, folder)
        found = stage or parse_model_path(ref.path, folder, ref.revision)
        adapter = None if ref.adapter is None else self._model(ref.adapter)
        if adapter is not None and found.path.startswith(STAGE):
            raise ValueError(NO_ADAPTER.format(found.text, ref.text))
        return ModelRef(ref.text, found.path, found.revision, adapter, ref.override_architecture)

    def _file(self, text: str) -> str:
        """The absolute path of a file, looked for in the working directory and then beside the recipe."""
        expanded = os.path.expanduser(text)
        beside = os.path.join(self._reader.folder or "", expanded)
        return os.path.abspath(beside if os.path.isfile(beside) and not os.path.isfile(expanded) else expanded)

    def are_adapters(self, models: Iterable[Source], base: ModelRef | None) -> bool:
        return are_adapters(models, base, self._is_adapter)

    def _is_adapter(self, ref: ModelRef) -> bool:
        if ref not in self._adapters:
            given = self._given.get(ref.path)
            self._adapters[ref] = is_adapter_ref(ref) if given is None else given
        return self._adapters[ref]


def _with_bases(reader: RecipeReader, disk: _Disk, recipe: Recipe) -> Recipe:
    """Adds the base to the models if it is an input of the method and not listed (as mergekit does)."""
    base = recipe.base_model

    def models(part: Recipe | Module, method: Method | None) -> tuple[Source, ...]:
        listed = part.models
        if not listed or base is None or method is None or not method.base_is_input:
            return listed
        if any(source.model == base for source in listed) or disk.are_adapters(listed, base):
            return listed
        return (*listed, Source(base, line=reader.line("base_model")))

    modules = {
        name: dataclasses.replace(
            part, models=models(part, reader.methods.get(part.merge_method) if part.merge_method else reader.method)
        )
        for name, part in recipe.modules.items()
    }
    return dataclasses.replace(recipe, models=models(recipe, reader.method), modules=modules)


def _with_donors(reader: RecipeReader, disk: _Disk, recipe: Recipe) -> Recipe:
    """Checks that the donors of config.json and tokenizer are models of the recipe, and names them as listed there."""
    listed = [ref for ref, _ in mentioned(dataclasses.replace(recipe, config_donor=None)).values()]
    changes: dict[str, Any] = {}
    for key in ("config_donor", "tokenizer_donor"):
        ref: ModelRef | None = getattr(recipe, key)
        if ref is None or UNREADABLE in (ref, *listed) or ref in listed:
            continue
        near = suggest(ref.text, list(dict.fromkeys(model.text for model in listed)))
        reader.problem(reader.line(key), f'"{key}" must be a model of this recipe, not "{ref.text}"; {near}')
        changes[key] = None
    if recipe.tokenizer_source not in (None, "base", "union"):
        text, line = str(recipe.tokenizer_source), reader.lines.get("tokenizer.source", reader.line("tokenizer_source"))
        model = disk.model(ModelRef(text, text, written="reference", line=line))
        changes["tokenizer_source"] = next((other.text for other in listed if other == model), model.text)
    return dataclasses.replace(recipe, **changes)
