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


ROLES = ("embedding", "q", "k", "v", "qkv", "o", "gate", "up", "gate_up", "down", "router", "norm", "head", "other")
# The last part of a module's name, of what its kind does not say already.
_ATTENTION_ROLES = {
    "q": ("q_proj", "q_lin", "query", "wq", "q"),
    "k": ("k_proj", "k_lin", "key", "wk", "k"),
    "v": ("v_proj", "v_lin", "value", "wv", "v"),
    "qkv": ("qkv_proj", "query_key_value", "c_attn", "wqkv", "qkv"),
    "o": ("o_proj", "out_proj", "out_lin", "c_proj", "dense", "wo", "o"),
}
_MLP_ROLES = {
    "gate": ("gate_proj", "w1", "wi_0"),
    "up": ("up_proj", "w3", "c_fc", "fc1", "lin1", "dense_h_to_4h", "wi", "wi_1"),
    "gate_up": ("gate_up_proj",),
    "down": ("down_proj", "w2", "c_proj", "fc2", "lin2", "dense_4h_to_h", "wo"),
    "router": ("gate", "router"),
}
_BERT = {"intermediate": "up", "output": "down"}  # the module before "dense" outside attention


def role_of(name: str) -> str:
    """One of ROLES: what a matrix does in its layer; a bias counts with its matrix."""
    kind = kind_of(name)
    if kind not in ("attention", "mlp", "other"):
        return kind
    parts = name.lower().split(".")
    modules = parts[:-1] if parts[-1] in ("weight", "bias") else parts
    leaf = modules[-1] if modules else ""
    if leaf == "dense" and kind == "other" and len(modules) > 1:
        return _BERT.get(modules[-2], "other")
    tables = {"attention": (_ATTENTION_ROLES,), "mlp": (_MLP_ROLES,), "other": (_ATTENTION_ROLES, _MLP_ROLES)}[kind]
    return next((role for table in tables for role, leaves in table.items() if leaf in leaves), "other")
