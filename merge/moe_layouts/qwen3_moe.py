"""Qwen3-MoE."""

from __future__ import annotations

from merge.moe_layouts import ATTENTION, NORMS, PROJECTIONS, Counts, MoeLayout, Window
from merge.moe_layouts.qwen2_moe import qwen_config


def _config(counts: Counts, window: Window) -> dict[str, object]:
    return {
        "architectures": ["Qwen3MoeForCausalLM"],
        "model_type": "qwen3_moe",
        **qwen_config(counts),
        "use_sliding_window": window.everywhere is not None,
        "sliding_window": window.everywhere,
        "max_window_layers": len(window.layers),
    }


LAYOUT = MoeLayout(
    words=("qwen3", "qwen3 moe", "qwen3_moe"),
    title="Qwen3-MoE",
    families=("qwen3",),
    block="mlp",
    names=PROJECTIONS,
    suffixes=(*NORMS, *ATTENTION, "self_attn.q_norm.weight", "self_attn.k_norm.weight"),
    config=_config,
    defaults={
        "qwen3": {
            "max_position_embeddings": 32768,
            "num_key_value_heads": 32,
            "head_dim": 128,
            "bos_token_id": None,
            "eos_token_id": None,
        },
    },
)
