"""DeepSeekMoE (Dai et al. 2024, arXiv:2401.06066) for transformers, which has no class for it.

The attention of Llama and Mistral; in place of each MLP a softmax router over experts, of which the best few are
weighed to sum to one, and a shared expert that every token goes through.
"""

from typing import Any

import torch
from torch import nn
from torch.nn import functional
from transformers import MistralForCausalLM
from transformers.activations import ACT2FN

from .configuration_deepseek import DeepseekConfig


class DeepseekMLP(nn.Module):  # type: ignore[misc]
    def __init__(self, config: Any, neurons: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, neurons, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, neurons, bias=False)
        self.down_proj = nn.Linear(neurons, config.hidden_size, bias=False)
        self.act_fn = ACT2FN[config.hidden_act]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


class DeepseekMoE(nn.Module):  # type: ignore[misc]
    def __init__(self, config: Any) -> None:
        super().__init__()
        self.top_k, self.normalize = config.num_experts_per_tok, config.norm_topk_prob
        self.scale = config.routed_scaling_factor
        self.gate = nn.Linear(config.hidden_size, config.n_routed_experts, bias=False)
        neurons = config.moe_intermediate_size
        self.experts = nn.ModuleList(DeepseekMLP(config, neurons) for _ in range(config.n_routed_experts))
        self.shared_experts = None
        if config.n_shared_experts:
            self.shared_experts = DeepseekMLP(config, neurons * config.n_shared_experts)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        x = hidden_states.reshape(-1, hidden_states.shape[-1])
        scores = functional.linear(x.float(), self.gate.weight.float()).softmax(dim=-1)
        weights, chosen = scores.topk(self.top_k, dim=-1, sorted=False)
        if self.normalize:
            weights = weights / weights.sum(dim=-1, keepdim=True)
        weights = (weights * self.scale).to(x.dtype)
        out = torch.zeros_like(x)
        for number, expert in enumerate(self.experts):
            token, place = torch.where(chosen == number)
            if len(token):
                out.index_add_(0, token, expert(x[token]) * weights[token, place, None])
        if self.shared_experts is not None:
            out = out + self.shared_experts(x)
        return out.view_as(hidden_states)


class DeepseekForCausalLM(MistralForCausalLM):  # type: ignore[misc]
    config_class = DeepseekConfig

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        for layer in self.model.layers:
            layer.mlp = DeepseekMoE(config)
        self.post_init()
