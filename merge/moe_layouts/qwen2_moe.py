"""Qwen2-MoE, and the config that it shares with Qwen3-MoE."""

from __future__ import annotations

from merge.moe_layouts import ATTENTION, BIASES, NORMS, PROJECTIONS, Counts, MoeLayout, Window


def qwen_config(counts: Counts) -> dict[str, object]:
    return {
        "num_experts": counts.n_experts,
        "intermediate_size": counts.neurons,
        "moe_intermediate_size": counts.neurons,
        "norm_topk_prob": True,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "output_router_logits": False,
        "router_aux_loss_coef": 0.001,
    }


def _config(counts: Counts, window: Window) -> dict[str, object]:
    return {
        "architectures": ["Qwen2MoeForCausalLM"],
        "model_type": "qwen2_moe",
        **qwen_config(counts),
        "qkv_bias": True,
        "shared_expert_intermediate_size": counts.shared_neurons,
        "use_sliding_window": any(window.layers),
        "sliding_window": window.size,
        "max_window_layers": len(window.layers),
        "layer_types": ["sliding_attention" if slides else "full_attention" for slides in window.layers],
    }


LAYOUT = MoeLayout(
    words=("qwen", "qwen moe", "qwen2", "qwen2_moe"),
    title="Qwen2-MoE",
    families=("qwen2", "llama", "mistral"),
    block="mlp",
    names=PROJECTIONS,
    suffixes=(*NORMS, *ATTENTION, *BIASES),
    config=_config,
    zero_biases=BIASES,
    shared="shared_expert",
    shared_gate=True,
    needs_shared=True,
    head_dim=False,
    mixed_window=True,
    defaults={
        "qwen2": {
            "max_position_embeddings": 32768,
            "num_key_value_heads": 32,
            "bos_token_id": None,
            "eos_token_id": None,
        },
    },
)
