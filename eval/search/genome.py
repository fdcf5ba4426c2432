"""Genomes of mergekit-evolve as recipes with open places.

`genome` has models, merge_method, base_model, tokenizer_source, layer_granularity (layers that share their values),
normalize, allow_negative_weights, smooth (values are knots between which layers are interpolated) and filters; `tasks`
are lm-eval's, with weights. Bounds are ours: weights lie in [0, 1], or [-1, 1] if they may be negative, densities in
[0.05, 1].

Source: docs/evolve.md of mergekit.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from eval.search.space import KIND, Space
from merge.checkpoint.files import read_json
from merge.checkpoint.hub import locate
from merge.errors import RecipeError
from merge.methods.registry import get_method
from merge.planning.load import find_recipe
from merge.recipe.references import parse_reference
from merge.schema.document import read_document, read_text
from merge.schema.keys import Key
from merge.schema.reader import Fields, Reader, join

_METHODS = ("linear", "task_arithmetic", "ties", "dare_ties", "slerp")
_FLAG, _TEXT = Key("bool"), Key("str")
_KEYS = {
    "models": Key(),
    "merge_method": Key("str", choices=_METHODS, noun="method of a genome"),
    "base_model": _TEXT,
    "tokenizer_source": _TEXT,
    "layer_granularity": Key("int", low=1),
    "normalize": _FLAG,
    "allow_negative_weights": _FLAG,
    "smooth": _FLAG,
    "filters": Key("words"),
}
_TASK = {"name": _TEXT, "weight": Key("float"), "metric": _TEXT}


@dataclass(frozen=True)
class OpenRecipe:
    """A recipe with open places, and of a genome the names of its tasks, with the weights and metrics that differ."""

    space: Space
    tasks: tuple[str, ...] = ()
    weights: Mapping[str, float] = field(default_factory=dict)
    metrics: Mapping[str, str] = field(default_factory=dict)


def open_recipe(path: Path) -> OpenRecipe:
    """A recipe with open places, or a genome. Raises RecipeError with all problems of either."""
    file = find_recipe(path)
    text = read_text(file, KIND)
    root = read_document(text, str(file), KIND)
    if not any(key.value == "genome" for key, _ in root.value):
        return OpenRecipe(Space.parse(text, str(file)))
    reader = Reader(str(file))
    fields = reader.fields(root, "", {"genome": Key(), "tasks": Key()}, "the file")
    written = fields.get("genome", root)
    if written is root:
        reader.problem(root, '"genome" is empty')
        reader.raise_if_any()
    genome = reader.fields(written, "genome", _KEYS, '"genome"')
    models = [reader.text(item, "genome.models") for item in reader.items(genome.get("models"), "genome.models")]
    for key in ("models", "merge_method"):
        if key not in genome:
            reader.problem(written, f'"genome" needs the key "{key}"')
    tasks, weights, metrics = _tasks(reader, fields)
    values = {key: genome.value(key) for key in genome if key != "models"}
    reader.raise_if_any()
    recipe = _recipe([str(model) for model in models], values, file)
    try:
        return OpenRecipe(Space.parse(json.dumps(recipe, indent=1), str(file)), tasks, weights, metrics)
    except RecipeError as error:  # lines of what was written of it would mislead
        raise RecipeError([dataclasses.replace(each, where=str(file)) for each in error.problems]) from None


def _tasks(reader: Reader, fields: Fields) -> tuple[tuple[str, ...], dict[str, float], dict[str, str]]:
    names: list[str] = []
    weights: dict[str, float] = {}
    metrics: dict[str, str] = {}
    for place, item in enumerate(reader.items(fields.get("tasks"), "tasks")):
        task = reader.fields(item, join("tasks", str(place)), _TASK, "a task")
        name = task.text("name")
        if name is None:
            reader.problem(item, 'a task needs the key "name"')
            continue
        names.append(name)
        if "weight" in task:
            weights[name] = task.number("weight") or 0.0
        if "metric" in task:
            metrics[name] = task.text("metric") or ""
    return tuple(names), weights, metrics


def _recipe(models: list[str], values: Mapping[str, Any], file: Path) -> dict[str, Any]:
    name = values["merge_method"]
    method = get_method(name)
    assert method is not None
    low = -1 if values.get("allow_negative_weights") else 0
    bounds = {"weight": [low, 1], "density": [0.05, 1], "t": [0, 1]}
    keys = [key for key in bounds if (found := method.parameter(key)) is not None and found.has_effect]
    per_model = [key for key in keys if key != "t"]
    base = values.get("base_model") if method.base == "required" else None
    kept = [model for model in models if model != base]
    layers, granularity = 0, values.get("layer_granularity")
    if granularity is not None:
        layers = _layers(models[0], file)
        granularity = min(granularity, layers)
    knots = -(-layers // granularity) if values.get("smooth") and granularity else 0

    def place(key: str) -> dict[str, Any]:
        found: dict[str, Any] = {"search": bounds[key]}
        if knots > 1:
            found["knots"] = knots
        return found | ({"filters": list(values["filters"])} if values.get("filters") else {})

    def entry(model: str) -> dict[str, Any]:
        return {"model": model} | ({"parameters": {key: place(key) for key in per_model}} if per_model else {})

    shared = {key: place(key) for key in keys if key not in per_model}
    recipe: dict[str, Any] = {"merge_method": name, "dtype": "bfloat16"}
    recipe |= {"base_model": base} if base else {}
    recipe |= {"tokenizer_source": values["tokenizer_source"]} if values.get("tokenizer_source") else {}
    if values.get("normalize") is not None and method.parameter("normalize") is not None:
        recipe["parameters"] = {"normalize": values["normalize"]}
    if not granularity or knots:
        recipe["models"] = [entry(model) for model in kept]
        if shared:
            recipe["parameters"] = recipe.get("parameters", {}) | shared
        return recipe
    sources = [*([{"model": base}] if base else []), *map(entry, kept)]
    recipe["slices"] = [
        {"sources": [source | {"layer_range": [start, min(start + granularity, layers)]} for source in sources]}
        | ({"parameters": dict(shared)} if shared else {})
        for start in range(0, layers, granularity)
    ]
    return recipe


def _layers(model: str, file: Path) -> int:
    """Raises RecipeError for a model that has no number of layers."""
    try:
        found = locate(parse_reference(model, file.parent))
        layers = read_json(str(Path(found.path) / "config.json")).get("num_hidden_layers")
    except ValueError as error:
        raise RecipeError(f"{file}: {error}") from None
    if not isinstance(layers, int):
        raise RecipeError(f"{file}: {model} has no num_hidden_layers in its config; leave layer_granularity out.")
    return layers
