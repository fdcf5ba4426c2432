"""config.json that is true to the weights written: dtype, layer count, per-layer lists, vocabulary size, tie flag."""

from __future__ import annotations

import copy
import json
from collections.abc import Sequence
from typing import Any

from merge.architecture import LAYER_COUNT_KEYS
from merge.errors import CheckpointError

# For each output layer: its source's directory and config, and the layer's number there.
LayerOrigins = Sequence[tuple[str, dict[str, Any], int]]


def output_config(
    donor: dict[str, Any], *, dtype: str, tied: bool, vocabulary: int | None, layers: LayerOrigins | None
) -> str:
    """Text of config.json.

    Args:
        donor: config of the base, else of the first model.
        dtype: torch name of what most weights are stored as.
        tied: whether the output has no head of its own.
        vocabulary: rows of the embedding matrix, if there is one.
        layers: where each layer comes from, for a stack that was rebuilt; None if the stack is the donor's.
    """
    config = copy.deepcopy(donor)
    text = config.get("text_config") or config
    config.pop("quantization_config", None)  # the weights are plain numbers now
    _set(config, text, ("dtype", "torch_dtype"), dtype)
    if tied or "tie_word_embeddings" in text or "tie_word_embeddings" in config:
        _set(config, text, ("tie_word_embeddings",), tied)
    if vocabulary is not None and "vocab_size" in text:
        text["vocab_size"] = vocabulary
    if layers is not None:
        _restack(text, layers)
    return json.dumps(config, indent=2, ensure_ascii=False) + "\n"


def _set(config: dict[str, Any], text: dict[str, Any], keys: tuple[str, ...], value: Any) -> None:
    """Sets every one of the keys that is there, in the config and in its text part; the first one if none is."""
    found = False
    for part in (config, text):
        for key in keys:
            if key in part:
                part[key] = value
                found = True
    if not found:
        config[keys[0]] = value


def _restack(text: dict[str, Any], layers: LayerOrigins) -> None:
    """Layer counts, and lists with one entry for each layer (layer_types, sliding windows ...)."""
    old = next((text[key] for key in LAYER_COUNT_KEYS if isinstance(text.get(key), int)), None)
    if old is None:
        return
    for key, value in text.items():
        if key in LAYER_COUNT_KEYS and value == old:
            text[key] = len(layers)
        elif isinstance(value, list) and len(value) == old:
            text[key] = [_entry(path, key, _text(config).get(key, value), number) for path, config, number in layers]


def _entry(path: str, key: str, values: Any, layer: int) -> Any:
    if not isinstance(values, list) or layer >= len(values):
        raise CheckpointError(
            f"{path}/config.json: {key}: expected a list with one value for each layer, up to layer {layer}, "
            f"found {values!r:.60}. Mend the file."
        )
    return values[layer]


def _text(config: dict[str, Any]) -> dict[str, Any]:
    return config.get("text_config") or config
