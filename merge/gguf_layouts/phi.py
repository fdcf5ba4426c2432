"""Phi 3 and 4 (mini)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from merge.gguf_layouts import Config, Family, head_dim, number, rope

if TYPE_CHECKING:
    from gguf import GGUFWriter


def _rotated(config: Config) -> int:
    return int(head_dim(config) * float(number(config, "partial_rotary_factor", default=1.0)))


def _phi3(writer: GGUFWriter, config: Config) -> None:
    original = int(number(config, "original_max_position_embeddings", "max_position_embeddings"))
    writer.add_rope_dimension_count(_rotated(config))
    writer.add_rope_scaling_orig_ctx_len(original)
    writer.add_sliding_window(int(config.get("sliding_window") or 0))
    scale = int(config["max_position_embeddings"]) / original
    if "long_factor" in rope(config):
        writer.add_rope_scaling_attn_factors(math.sqrt(1 + math.log(scale) / math.log(original)) if scale > 1 else 1.0)


def _factors(config: Config) -> Mapping[str, list[float]]:
    parameters = rope(config)
    return {
        f"rope_factors_{name}.weight": [float(value) for value in parameters[f"{name}_factor"]]
        for name in ("long", "short")
        if f"{name}_factor" in parameters
    }


def _config(metadata: Config) -> dict[str, Any]:
    return {
        "architectures": ["Phi3ForCausalLM"],
        "model_type": "phi3",
        "original_max_position_embeddings": int(metadata["rope.scaling.original_context_length"]),
        "sliding_window": int(metadata.get("attention.sliding_window", 0)) or None,
        "partial_rotary_factor": int(metadata["rope.dimension_count"]) / int(metadata["attention.key_length"]),
    }


FAMILIES = (
    Family(
        "phi3",
        ("Phi3ForCausalLM",),
        _phi3,
        extra=_factors,
        names={"attn_qkv": "self_attn.qkv_proj", "ffn_up": "mlp.gate_up_proj"},
        config=_config,
    ),
)
