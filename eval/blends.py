"""Weighted averages of models as subjects: linear recipes, merged on the fly when their answers are not known."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path

from eval.models import Subject, directory, is_recipe, subjects
from merge import build_plan
from merge.errors import UsageError
from merge.planning.resolve import made_recipe, reference
from merge.recipe.model import Recipe, Source


def blend_recipe(models: Sequence[str], weights: Sequence[float], name: str) -> Recipe:
    """A weighted average, without models of weight 0."""
    sources = [
        Source(reference(model), parameters={"weight": weight})
        for model, weight in zip(models, weights, strict=True)
        if weight
    ]
    return Recipe("linear", tuple(sources), name=name)


def blend(models: Sequence[str], weights: Sequence[float], name: str) -> Subject:
    """Raises RecipeError for models that cannot be averaged."""
    plan = build_plan(made_recipe(blend_recipe(models, weights, name)))
    return Subject(name, name, plan=plan)


@contextlib.contextmanager
def on_disk(models: Sequence[str], verb: str, keep: Path | None = None) -> Iterator[list[Subject]]:
    """The named models, each with a `text` for use in a recipe: recipes are merged into directories first.

    Args:
        verb: for messages.
        keep: directory where they stay; None: they are removed at the end.

    Raises:
        UsageError: a model that is named twice.
        MergeError: a recipe or model that is wrong.
    """
    if len(set(models)) < len(models):
        raise UsageError(f"{verb}: a model is named twice.")
    with contextlib.ExitStack() as stack:
        found = []
        for subject in subjects(list(models)):
            if is_recipe(subject.text):
                path = stack.enter_context(directory(subject, keep)).resolve()
                subject = Subject(str(path), subject.name, path=path)
            found.append(subject)
        yield found


def short_names(models: Sequence[str]) -> list[str]:
    """The last part of each path, or whole paths if two are the same."""
    names = [Path(model).name or model for model in models]
    return names if len(set(names)) == len(names) else list(models)
