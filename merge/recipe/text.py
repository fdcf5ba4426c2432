"""A recipe made of values -> equivalent YAML, for the result's files and for `merge verify`."""

from __future__ import annotations

import json

from merge.dtypes import torch_name
from merge.recipe.model import ModelRef, Recipe

_PLAIN = ("name", "merge_method", "tokenizer_source", "parameters", "allow")


def text_of(recipe: Recipe) -> str:
    """Values are written as JSON. For recipes of whole models, which is what commands make."""
    values: dict[str, object] = {key: getattr(recipe, key) for key in _PLAIN}
    values["dtype"] = recipe.dtype and torch_name(recipe.dtype)
    if recipe.base_model is not None:
        values["base_model"] = _reference(recipe.base_model)
    lines = [f"{key}: {_json(value)}" for key, value in values.items() if value]
    lines.append("models:")
    for source in recipe.models:
        lines.append(f"  - model: {_json(_reference(source.model))}")
        if source.parameters:
            lines.append(f"    parameters: {_json(dict(source.parameters))}")
    return "\n".join(lines) + "\n"


def _json(value: object) -> str:
    return json.dumps(value, ensure_ascii=False)


def _reference(ref: ModelRef) -> str | dict[str, dict[str, str]]:
    """The reference as written; a model and an adapter separately, because either may have a "+" in its path."""
    if ref.adapter is None:
        return ref.text
    return {"model": _path(ref), "lora": _path(ref.adapter)}


def _path(ref: ModelRef) -> dict[str, str]:
    return {"path": ref.path} | ({} if ref.revision is None else {"revision": ref.revision})
