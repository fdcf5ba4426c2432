"""Opens the models that a recipe names; all problems with them are reported together."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from pathlib import Path

from merge.adapters.fold import open_model
from merge.adapters.inputs import refused_models
from merge.checkpoint import Checkpoint
from merge.errors import CheckpointError, Problem, RecipeError
from merge.methods import get_method, known_method
from merge.planning.kind import are_adapters
from merge.recipe.mentioned import key_of, mentioned
from merge.recipe.model import ModelRef, Recipe
from merge.recipe.references import STAGE, no_directory, parse_reference, similar_directory


def first_model(recipe: Recipe) -> ModelRef:
    """The base; without one, the model listed first."""
    listed = mentioned(dataclasses.replace(recipe, config_donor=None))
    return next(ref for ref, _ in listed.values())


def open_models(recipe: Recipe, known: Mapping[str, Checkpoint] | None = None) -> list[Checkpoint]:
    """Opens every model of a recipe, the donor of config.json first.

    Args:
        known: checkpoints that no directory holds (yet), by the path of their references.

    Raises:
        CheckpointError: models that cannot be opened, all of them.
        RecipeError: the same, if the recipe misspells a directory or chooses models that do not fit together.
    """
    method = known_method(recipe.merge_method)
    problems = refused_models(recipe, method)
    checkpoints, failures = [], []
    for ref, where in mentioned(recipe).values():
        try:
            checkpoints.append(open_model(ref, known or {}))
        except CheckpointError as error:
            failures.append((where, error))
            problems += _misspelt(ref, where, recipe)
    if problems:
        told = [Problem(str(error), where) for where, error in failures if not _is_told(where, problems)]
        raise RecipeError([*problems, *told])
    if failures:
        raise CheckpointError("\n".join(str(error) for _, error in failures)) from failures[0][1]
    if not checkpoints:
        raise RecipeError(Problem("the recipe names no model"))
    return _donor_first(recipe, [_with_chosen_tokenizer(checkpoint, recipe) for checkpoint in checkpoints])


def _with_chosen_tokenizer(checkpoint: Checkpoint, recipe: Recipe) -> Checkpoint:
    """Gives a model with an adapter the adapter's tokenizer if the recipe's tokenizer_source names the adapter."""
    adapter, source = checkpoint.ref.adapter, recipe.tokenizer_source
    if adapter is None or source in (None, "base", "union"):
        return checkpoint
    try:
        ref = parse_reference(str(source), None if recipe.file is None else Path(recipe.file).parent)
    except ValueError:  # reported where the tokenizer is looked for
        return checkpoint
    is_it = key_of(ref) == key_of(adapter)
    return dataclasses.replace(checkpoint, own_tokenizer=checkpoint.adapter_path) if is_it else checkpoint


def _donor_first(recipe: Recipe, checkpoints: list[Checkpoint]) -> list[Checkpoint]:
    """Puts a model with a model_type first, unless the recipe names a donor: without it no config loads."""
    if recipe.config_donor is not None or checkpoints[0].config.get("model_type"):
        return checkpoints
    typed = next((one for one in checkpoints if one.config.get("model_type")), checkpoints[0])
    return [typed, *(one for one in checkpoints if one is not typed)]


def _misspelt(ref: ModelRef, where: str | None, recipe: Recipe) -> list[Problem]:
    """Problems of the parts of a reference (model, adapter) that are misspelt directories.

    A name without a "/" is no hub id. One with a "/" may be, unless a directory here has nearly the same name.
    """
    folder = None if recipe.file is None else Path(recipe.file).parent
    return [
        Problem(no_directory(part.path, folder), where)
        for part in (ref, ref.adapter)
        if part is not None and not os.path.exists(part.path) and not part.path.startswith(STAGE)
        if "/" not in part.path or similar_directory(part.path, folder) is not None
    ]


def _is_told(where: str | None, problems: list[Problem]) -> bool:
    """Whether a problem was already reported for this line: an adapter alone cannot be opened as a model either."""
    return where is not None and any(problem.where == where for problem in problems)


def problems_of_models(recipe: Recipe) -> list[Problem]:
    """The problems of the recipe's models, to be reported together with those of its keys. Nothing is downloaded."""
    refs = {key: found for key, found in mentioned(recipe).items() if found[0].path}  # "": not readable as a reference
    problems: list[Problem] = []
    method = get_method(recipe.merge_method)
    if all(os.path.isdir(ref.path) for ref, _ in refs.values()):
        if are_adapters(recipe.models, recipe.base_model):
            return []
        problems = refused_models(recipe, method) if method is not None else []
    for ref, where in refs.values():
        try:
            if os.path.isdir(ref.path) and (ref.adapter is None or os.path.isdir(ref.adapter.path)):
                open_model(ref)
            elif misspelt := _misspelt(ref, where, recipe):
                problems += misspelt
            elif os.path.isdir(folder := os.path.dirname(ref.path)):
                problems.append(Problem(f'there is no directory "{ref.path}", while there is "{folder}"', where))
        except CheckpointError as error:
            problems += [] if _is_told(where, problems) else [Problem(str(error), where)]
    return problems
