"""Notes on the donor of config.json, and on fields in which the other models' configs differ from it.

Only fields that change what a model computes, or how its weights are read, are noted.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from merge.planning.inputs import Inputs
from merge.planning.models import first_model
from merge.quoting import quoted
from merge.recipe.model import Recipe

# Fields that do not change what is computed, or that merge/output/config.py sets for the result.
_OTHER = frozenset(
    (
        *("_name_or_path", "name_or_path", "model_name", "_commit_hash", "transformers_version", "unsloth_version"),
        *("dtype", "torch_dtype", "auto_map", "quantization_config", "tie_word_embeddings", "architectures"),
        *("use_cache", "output_attentions", "output_hidden_states", "return_dict", "torchscript", "pretraining_tp"),
        *("gradient_checkpointing", "_attn_implementation", "attn_implementation", "_attn_implementation_autoset"),
        *("id2label", "label2id", "num_labels", "problem_type", "initializer_range", "unsloth_fixed"),
    )
)
_OF_STACKS = frozenset(("num_hidden_layers", "n_layer", "n_layers", "num_layers", "layer_types", "max_window_layers"))
_MOST = 6  # fields that a note lists


def donor_notes(recipe: Recipe, inputs: Inputs) -> Iterator[str]:
    """Notes on the donor of config.json."""
    first = first_model(recipe).text
    donor = inputs.donor
    if not donor.config.get("model_type"):
        yield f"config.json of {donor.ref.text} has no model_type, and so will that of the result: nothing loads it"
    elif donor.ref.text != first and recipe.config_donor is None:
        yield f"config.json of {first} has no model_type; that of {donor.ref.text} is taken"
    without = _OF_STACKS if recipe.slices or recipe.upscale else frozenset()
    if recipe.tokenizer_source is not None:
        without |= {"vocab_size"}
    for model in inputs.all[1:]:
        fields = list(_differences(*_comparable(donor.config, model.config), without))
        if fields:
            more = f" and {len(fields) - _MOST} more" if len(fields) > _MOST else ""
            said = f"config.json is that of {donor.ref.text}; {model.ref.text} has {', '.join(fields[:_MOST])}{more}"
            yield f'{said} ("config_donor" chooses)'


def _comparable(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> tuple[Mapping[str, Any], Mapping[str, Any]]:
    """Both configs whole; of a vision-language model and a language model, the part that both have."""
    parts = [config.get("text_config") for config in (ours, theirs)]
    if isinstance(parts[0], Mapping) == isinstance(parts[1], Mapping):
        return ours, theirs
    a, b = parts[0] or ours, parts[1] or theirs
    shared = [key for key in a if key in b and key != "model_type"]
    return {key: a[key] for key in shared}, {key: b[key] for key in shared}


def _differences(
    ours: Mapping[str, object], theirs: Mapping[str, object], without: frozenset[str], path: str = ""
) -> Iterator[str]:
    """`rope_theta 500000.0 in place of 10000.0`; a null key counts as missing"""
    for key in dict.fromkeys((*ours, *theirs)):
        a, b = ours.get(key), theirs.get(key)
        if a == b or key in _OTHER or key in without or "drop" in key:
            continue
        if isinstance(a, Mapping) and isinstance(b, Mapping):
            yield from _differences(a, b, without, f"{path}{key}.")
        else:
            yield f"{path}{key} {quoted(b, 40)} in place of {quoted(a, 40)}"
