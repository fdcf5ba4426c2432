"""Configuration of DeepSeekMoE (Dai et al. 2024, arXiv:2401.06066): Llama's attention, experts for each MLP.

transformers has no class for it. Loaded from beside the weights with trust_remote_code=True; vLLM has its own model.
"""

from transformers import MistralConfig


class DeepseekConfig(MistralConfig):  # type: ignore[misc]
    """Llama's and Mistral's keys, and those of the experts."""

    model_type = "deepseek"

    n_routed_experts: int = 8
    n_shared_experts: int | None = None
    num_experts_per_tok: int = 2
    moe_intermediate_size: int = 1408
    first_k_dense_replace: int = 0
    moe_layer_freq: int = 1
    norm_topk_prob: bool = True
    scoring_func: str = "softmax"
    routed_scaling_factor: float = 1.0
