"""What the name of a tensor alone says of it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_EMBEDDINGS = ("embed_tokens", "word_embeddings", "wte", "tok_embeddings", "embed_in", "shared")
_INPUT_SIDE = (*_EMBEDDINGS, "embed", "wpe")
_HEADS = ("lm_head", "embed_out", "output")


def _parts(name: str) -> list[str]:
    return name.split(".")


def is_input_side(name: str) -> bool:
    """Whether a tensor outside the stacks comes before the layers (embeddings) and not after (final norm, head)."""
    return any(part.startswith(_INPUT_SIDE) for part in _parts(name)) and not is_head(name)


def is_embedding(name: str) -> bool:
    """The token embedding matrix."""
    parts = _parts(name)
    return len(parts) > 1 and parts[-1] == "weight" and parts[-2] in _EMBEDDINGS


def is_head(name: str) -> bool:
    """The output matrix that may be tied to the embedding."""
    parts = _parts(name)
    return parts[-1] == "weight" and len(parts) <= 3 and parts[-2] in _HEADS if len(parts) > 1 else False


def says_tied(config: Mapping[str, Any]) -> bool | None:
    """tie_word_embeddings of the config, the text model's where there is one; None if it is not said."""
    text = config.get("text_config") or {}
    for part in (text, config):
        if "tie_word_embeddings" in part:
            return bool(part["tie_word_embeddings"])
    return None
