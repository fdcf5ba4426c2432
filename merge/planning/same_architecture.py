"""Checks that a recipe's models have one architecture and size; no leniency permits a difference.

Without this check, leniencies meant for single tensors would put the tensors of two models side by side in one file.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from merge.architecture import LAYER_COUNT_KEYS, is_embedding
from merge.errors import Problem
from merge.planning.inputs import Input, Inputs
from merge.recipe.mentioned import mentioned
from merge.recipe.model import Recipe

_SIZES = (
    *("hidden_size", "n_embd", "d_model", "intermediate_size", "n_inner", "d_ff", "ffn_dim"),
    *("num_attention_heads", "n_head", "num_key_value_heads", "head_dim"),
)
_SHARE = 0.5  # share of the tensors: with fewer in common the architecture differs, with more of another shape the size


def different_architectures(recipe: Recipe, inputs: Inputs) -> Iterator[Problem]:
    """One problem for each model that cannot be merged with the first, whatever the recipe allows."""
    donor = inputs.donor
    is_whole = not recipe.slices and not recipe.modules
    places = {ref.text: where for ref, where in mentioned(recipe).values()}
    for model in inputs.all[1:]:
        common = [name for name in model.tensors if name in donor.tensors]
        where = places.get(model.ref.text)
        if len(common) < _SHARE * min(len(model.tensors), len(donor.tensors)):
            said = f"{_named(model)} and {_named(donor)} are not of one architecture: {_example(model, donor)}."
            yield Problem(said, where, _BEYOND)
            continue
        other = [name for name in common if model.tensors[name].shape != donor.tensors[name].shape]
        wide = [name for name in other if is_embedding(name) and _shape(model, name)[1:] != _shape(donor, name)[1:]]
        if wide or len(other) > _SHARE * len(common):
            name = (wide or other)[0]
            sizes = _sizes(model.config, donor.config) or f"{name} {_shape(model, name)} and {_shape(donor, name)}"
            yield Problem(f"{model.ref.text} and {donor.ref.text} differ in size: {sizes}.", where, _BEYOND)
        elif is_whole and (depths := _depths(model, donor)):
            said = f"{model.ref.text} has {depths[0]} layers and {donor.ref.text} {depths[1]}."
            yield Problem(said, where, 'List matching layers under "slices"; no "allow" permits this.')


_BEYOND = 'They cannot be merged, and no "allow" changes that.'


def _depths(model: Input, donor: Input) -> tuple[int, int] | None:
    """The numbers of layers, if configs and tensors agree that they differ."""
    ours, theirs = (_text(each.config) for each in (model, donor))
    counts = [(ours.get(key), theirs.get(key)) for key in LAYER_COUNT_KEYS]
    differ = any(a is not None and b is not None and a != b for a, b in counts)
    if not differ or model.main is None or donor.main is None or model.main.n_layers == donor.main.n_layers:
        return None
    return model.main.n_layers, donor.main.n_layers


def _named(model: Input) -> str:
    kind = model.config.get("model_type")
    return f"{model.ref.text} ({kind})" if isinstance(kind, str) else model.ref.text


def _example(model: Input, donor: Input) -> str:
    """`28 tensors of ./gpt2 (h.0.ln_1.weight ...) are not in the other`"""
    strange = [name for name in model.tensors if name not in donor.tensors]
    if not strange:
        strange, model = [name for name in donor.tensors if name not in model.tensors], donor
    name = next((name for name in strange if any(part.isdecimal() for part in name.split("."))), strange[0])
    return f"{len(strange):,} tensors of {model.ref.text} ({name} ...) are not in the other"


def _shape(model: Input, name: str) -> list[int]:
    return list(model.tensors[name].shape)


def _text(config: Mapping[str, Any]) -> Mapping[str, Any]:
    return config.get("text_config") or config


def _sizes(config: Mapping[str, object], other: Mapping[str, object]) -> str:
    """`hidden_size 512 and 192, head_dim 64 and 32`; of the text models if the configs have them"""
    ours, theirs = _text(config), _text(other)
    pairs = [(key, ours.get(key), theirs.get(key)) for key in _SIZES]
    return ", ".join(f"{key} {a} and {b}" for key, a, b in pairs if a is not None and b is not None and a != b)
