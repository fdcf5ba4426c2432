"""Weighted averages of models as subjects: linear recipes, merged on the fly when their answers are not known."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from eval.models import Subject
from merge import build_plan, parse_recipe
from merge.errors import UsageError


def blend_recipe(models: Sequence[str], weights: Sequence[float], name: str) -> str:
    """A recipe's text; a model of weight 0 is left out, since its weights play no part."""
    lines = [f"name: {json.dumps(name)}", "merge_method: linear", "models:"]
    for model, weight in zip(models, weights, strict=True):
        if weight:
            lines += [f"  - model: {json.dumps(model, ensure_ascii=False)}", f"    parameters: {{weight: {weight!r}}}"]
    return "\n".join(lines) + "\n"


def blend(models: Sequence[str], weights: Sequence[float], name: str) -> Subject:
    """Raises RecipeError for models that cannot be averaged."""
    plan = build_plan(parse_recipe(blend_recipe(models, weights, name)))
    return Subject(name, name, plan=plan)


def check_models(models: Sequence[str], verb: str) -> None:
    """Raises UsageError for what no recipe can name."""
    for model in models:
        if model.endswith((".yaml", ".yml")):
            raise UsageError(f"{verb}: {model} is a recipe. Run it first (merge run) and name its output.")
    if len(set(models)) < len(models):
        raise UsageError(f"{verb}: a model is named twice.")


def short_names(models: Sequence[str]) -> list[str]:
    """Last parts of the paths, unless two are the same."""
    names = [Path(model).name or model for model in models]
    return names if len(set(names)) == len(names) else list(models)
