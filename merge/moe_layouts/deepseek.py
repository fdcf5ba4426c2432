"""DeepSeekMoE (Dai et al. 2024, arXiv:2401.06066), the first generation."""

from __future__ import annotations

from merge.moe_layouts import ATTENTION, NORMS, PROJECTIONS, Counts, MoeLayout, Window


def _config(counts: Counts, window: Window) -> dict[str, object]:
    return {
        "architectures": ["DeepseekForCausalLM"],
        "model_type": "deepseek",
        "auto_map": {
            "AutoConfig": "configuration_deepseek.DeepseekConfig",
            "AutoModelForCausalLM": "modeling_deepseek.DeepseekForCausalLM",
        },
        "n_routed_experts": counts.n_experts,
        "n_shared_experts": counts.n_shared or None,
        "intermediate_size": counts.neurons,
        "moe_intermediate_size": counts.neurons,
        "first_k_dense_replace": 0,
        "moe_layer_freq": 1,
        "norm_topk_prob": True,
        "scoring_func": "softmax",
        "routed_scaling_factor": 1.0,
        "sliding_window": window.everywhere,
    }


LAYOUT = MoeLayout(
    words=("deepseek", "deepseek moe"),
    title="DeepSeek-MoE",
    families=("llama", "mistral"),
    block="mlp",
    names=PROJECTIONS,
    suffixes=(*NORMS, *ATTENTION),
    config=_config,
    shared="shared_experts",
    ties=False,
    head_dim=False,
    files=("configuration_deepseek.py", "modeling_deepseek.py"),
)
