"""Facts from a tensor's name alone."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

# The part before "weight" in names, in all architectures of table.json.
_EMBEDDINGS = (
    *("embed_tokens", "word_embeddings", "wte", "tok_embeddings", "embed_in", "shared", "embeddings"),
    *("word_embedding", "token_embedding", "tokens_embed"),
)
_INPUT_SIDE = (*_EMBEDDINGS, "embed", "wpe", "mask_emb", "position")
_HEADS = ("lm_head", "embed_out", "output", "lm_loss", "proj_out", "generator_lm_head", "vocab_projector")
_DECODERS = ("predictions", "lm_head")  # in front of "decoder"


def _parts(name: str) -> list[str]:
    return name.split(".")


def is_input_side(name: str) -> bool:
    """Whether a tensor outside the stacks comes before the layers (embeddings) rather than after (norm, head)."""
    return any(part.startswith(_INPUT_SIDE) for part in _parts(name)) and not is_head(name)


def is_embedding(name: str) -> bool:
    """The token embedding matrix."""
    parts = _parts(name)
    return len(parts) > 1 and parts[-1] == "weight" and parts[-2] in _EMBEDDINGS


def is_head(name: str) -> bool:
    """The output matrix that may be tied to the embedding."""
    parts = _parts(name)
    if parts[-1] != "weight" or not 2 <= len(parts) <= 4:
        return False
    if parts[-2] == "decoder":
        return len(parts) == 2 or parts[-3] in _DECODERS
    return parts[-2] in _HEADS and len(parts) <= (2 if parts[-2] == "proj_out" else 3)


def says_tied(config: Mapping[str, Any]) -> bool | None:
    """tie_word_embeddings of the config, or of its text section; None if missing."""
    text = config.get("text_config") or {}
    for part in (text, config):
        if "tie_word_embeddings" in part:
            return bool(part["tie_word_embeddings"])
    return None
