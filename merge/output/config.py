"""config.json of the result, adapted to its weights: dtype, layer count, per-layer lists, vocabulary, ties."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping, Sequence
from typing import Any

from merge.architecture import config_section
from merge.output.layers import Restacked, restack
from merge.planned import Planned


def output_config(
    donor: dict[str, Any],
    *,
    dtype: str,
    tie_flags: Mapping[str, bool],
    vocabulary: int | None,
    stacks: Sequence[Restacked],
) -> Planned[str]:
    """Text of config.json.

    Args:
        donor: config of the base, else of the first model.
        dtype: torch name of the dtype of most weights.
        tie_flags: sections ("" is the whole) -> the new value of tie_word_embeddings.
        vocabulary: rows of the embedding matrix, if there is one.
        stacks: the origin of each layer, for every rebuilt stack.
    """
    config = copy.deepcopy(donor)
    text = config.get("text_config") or config
    for part in (config, text):
        for key in ("quantization_config", "compression_config"):
            part.pop(key, None)  # the weights are plain numbers now
    _set(config, text, ("dtype", "torch_dtype"), dtype)
    for path, flag in tie_flags.items():
        section = config_section(config, path)
        if isinstance(section, dict):
            section.pop("tie_embedding", None)  # LFM2 would use it
            section["tie_word_embeddings"] = flag
    if vocabulary is not None and "vocab_size" in text:
        text["vocab_size"] = vocabulary
    notes = [note for stack in stacks for note in restack(config, stack)]
    return Planned(json.dumps(config, indent=2, ensure_ascii=False) + "\n", notes=tuple(notes))


def _set(config: dict[str, object], text: dict[str, object], keys: tuple[str, ...], value: object) -> None:
    """Sets every existing one of the keys, in the config and its text section; the first key if none exists."""
    found = False
    for part in (config, text):
        for key in keys:
            if key in part:
                part[key] = value
                found = True
    if not found:
        config[keys[0]] = value
