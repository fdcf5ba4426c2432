"""Classifies tensors by name for tables, never for decisions."""

from __future__ import annotations

from merge.architecture import is_embedding, is_head

KINDS = ("embedding", "attention", "mlp", "norm", "head", "other")
_NORMS = ("norm", "ln_", "layer_norm", "layernorm", "ln1", "ln2")
_ATTENTION = ("attn", "attention")
_MLP = ("mlp", "feed_forward", "ffn", "experts", "block_sparse_moe")


def kind_of(name: str) -> str:
    """One of KINDS. A norm inside attention (q_norm) is a norm."""
    parts = name.split(".")
    if is_embedding(name):
        return "embedding"
    if is_head(name):
        return "head"
    own = [part.lower() for part in parts[-2:]]
    if any(mark in part for part in own for mark in _NORMS):
        return "norm"
    for kind, marks in (("attention", _ATTENTION), ("mlp", _MLP)):
        if any(mark in part.lower() for part in parts for mark in marks):
            return kind
    return "other"
