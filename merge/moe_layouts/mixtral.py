"""Mixtral (Jiang et al. 2024, arXiv:2401.04088)."""

from __future__ import annotations

from merge.moe_layouts import ATTENTION, NORMS, Counts, MoeLayout, Window


def _config(counts: Counts, window: Window) -> dict[str, object]:
    return {
        "architectures": ["MixtralForCausalLM"],
        "model_type": "mixtral",
        "num_local_experts": counts.n_experts,
        "intermediate_size": counts.neurons,
        "output_router_logits": False,
        "router_aux_loss_coef": 0.001,
        "sliding_window": window.everywhere,
    }


LAYOUT = MoeLayout(
    words=("mixtral",),
    title="Mixtral",
    families=("llama", "mistral"),
    block="block_sparse_moe",
    names=("w1", "w3", "w2"),
    suffixes=(*NORMS, *ATTENTION),
    config=_config,
    defaults={
        "llama": {"max_position_embeddings": 2048, "bos_token_id": 1, "eos_token_id": 2},
        "mistral": {
            "max_position_embeddings": 131072,
            "num_key_value_heads": 8,
            "sliding_window": 4096,
            "bos_token_id": 1,
            "eos_token_id": 2,
        },
    },
)
