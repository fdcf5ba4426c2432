"""The config of a mixture: that of the dense model with all defaults written out, and the layout's keys."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

from merge.moe_layouts import Counts, MoeLayout, Window, all_layouts

_EVERYWHERE = {"hidden_act": "silu", "rms_norm_eps": 1e-6, "initializer_range": 0.02, "tie_word_embeddings": False}
_THETA = 10000.0
_WINDOW_KEYS = ("sliding_window", "use_sliding_window", "max_window_layers", "layer_types")
_DENSE_ONLY = ("architectures", "model_type", "auto_map", "quantization_config", "mlp_bias", "pretraining_tp")


def defaults() -> Mapping[str, Mapping[str, object]]:
    """Family -> transformers' defaults for keys that a dense model's config.json lacks; layouts differ."""
    return {family: found for layout in all_layouts().values() for family, found in layout.defaults.items()}


def settled(config: Mapping[str, Any]) -> dict[str, Any]:
    """A dense model's config with all defaults of its class written out."""
    full = {**_EVERYWHERE, **defaults()[config["model_type"]], **copy.deepcopy(dict(config))}
    if full.get("num_key_value_heads") is None:
        full["num_key_value_heads"] = full["num_attention_heads"]
    if full.get("head_dim") is None:
        full["head_dim"] = full["hidden_size"] // full["num_attention_heads"]
    if isinstance(full.get("rope_parameters"), dict):
        full["rope_parameters"] = {"rope_theta": full.get("rope_theta") or _THETA, **full["rope_parameters"]}
    elif full.get("rope_theta") is None:
        full["rope_theta"] = _THETA
    return full


def window_of(config: Mapping[str, Any]) -> Window:
    """The layers in which a dense model (defaults written out) attends to a window only."""
    n, family, types = config["num_hidden_layers"], config["model_type"], config.get("layer_types")
    has_switch = family in ("qwen2", "qwen3")
    size = config.get("sliding_window", 4096 if has_switch else None)
    if family == "llama" or size is None or (has_switch and not config.get("use_sliding_window")):
        return Window(None, (False,) * n)
    if isinstance(types, list) and len(types) == n:
        return Window(size, tuple(kind == "sliding_attention" for kind in types))
    first = config.get("max_window_layers", 28) if has_switch else 0
    return Window(size, tuple(i >= first for i in range(n)))


def moe_config(layout: MoeLayout, config: Mapping[str, object], counts: Counts) -> dict[str, object]:
    """The mixture's config: the dense model's with defaults written out, and the layout's keys."""
    kept = {key: value for key, value in config.items() if key not in (*_WINDOW_KEYS, *_DENSE_ONLY)}
    if not layout.head_dim:
        kept.pop("head_dim", None)
    return {**kept, **layout.config(counts, window_of(config)), "num_experts_per_tok": counts.per_token}
