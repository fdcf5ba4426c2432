"""The layouts a mixture of experts can have on disk, as transformers 5 and vLLM read them, and their configs.

Mixtral (Jiang et al. 2024, arXiv:2401.04088), Qwen2-MoE and Qwen3-MoE, DeepSeekMoE (Dai et al. 2024, arXiv:2401.06066).
Each is the architecture of a dense family with its MLP put there several times, so only these families fit.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

PROJECTIONS = ("gate_proj", "up_proj", "down_proj")
_NORMS = ("input_layernorm.weight", "post_attention_layernorm.weight")
_ATTENTION = tuple(f"self_attn.{name}_proj.weight" for name in "qkvo")
BIASES = tuple(f"self_attn.{name}_proj.bias" for name in "qkv")

# What transformers takes where a config.json does not say; the classes of the layouts have other defaults.
DEFAULTS: dict[str, dict[str, Any]] = {
    "llama": {"max_position_embeddings": 2048, "bos_token_id": 1, "eos_token_id": 2},
    "mistral": {
        "max_position_embeddings": 131072,
        "num_key_value_heads": 8,
        "sliding_window": 4096,
        "bos_token_id": 1,
        "eos_token_id": 2,
    },
    "qwen2": {"max_position_embeddings": 32768, "num_key_value_heads": 32, "bos_token_id": None, "eos_token_id": None},
    "qwen3": {
        "max_position_embeddings": 32768,
        "num_key_value_heads": 32,
        "head_dim": 128,
        "bos_token_id": None,
        "eos_token_id": None,
    },
}
_EVERYWHERE = {"hidden_act": "silu", "rms_norm_eps": 1e-6, "initializer_range": 0.02, "tie_word_embeddings": False}
_THETA = 10000.0
_WINDOW_KEYS = ("sliding_window", "use_sliding_window", "max_window_layers", "layer_types")
_DENSE_ONLY = ("architectures", "model_type", "auto_map", "quantization_config", "mlp_bias", "pretraining_tp")


@dataclass(frozen=True)
class Counts:
    """Sizes of a mixture: experts, shared ones, experts for each token, neurons of each and of the shared one."""

    n_experts: int
    n_shared: int
    per_token: int
    neurons: int
    shared_neurons: int


@dataclass(frozen=True)
class Window:
    """Which layers see only the last `size` tokens."""

    size: int | None
    layers: tuple[bool, ...]

    @property
    def everywhere(self) -> int | None:
        """The size if all layers have it."""
        return self.size if self.layers and all(self.layers) else None

    @property
    def is_mixed(self) -> bool:
        return any(self.layers) and not all(self.layers)


@dataclass(frozen=True)
class MoeLayout:
    """One layout.

    Attributes:
        title: as messages name it.
        families: model types of dense models that fit.
        block: module of a layer that holds router and experts.
        names: of an expert's projections, in the order of PROJECTIONS.
        suffixes: of all other tensors of a layer.
        zero_biases: biases that the layout has; zeros for families other than the first.
        shared: module of the shared expert, below `block`.
        shared_gate: the shared expert has a gate of its own, the sigmoid of one row.
        most_shared: how many shared experts it can have; with `needs_shared` it always has one.
        ties: whether its head may be tied to the embedding.
        head_dim: whether heads may have another width than hidden_size / num_attention_heads.
        config: keys of its own.
        files: of the code that it needs, in merge/output.
    """

    title: str
    families: tuple[str, ...]
    block: str
    names: tuple[str, str, str]
    suffixes: tuple[str, ...]
    config: Callable[[Counts, Window], dict[str, Any]]
    zero_biases: tuple[str, ...] = ()
    shared: str | None = None
    shared_gate: bool = False
    needs_shared: bool = False
    ties: bool = True
    head_dim: bool = True
    mixed_window: bool = False
    files: tuple[str, ...] = ()

    @property
    def most_shared(self) -> int:
        return 0 if self.shared is None else 1

    def expert(self, number: int, projection: str) -> str:
        """Suffix of a projection of a routed expert."""
        return f"{self.block}.experts.{number}.{self.names[PROJECTIONS.index(projection)]}.weight"

    def shared_expert(self, projection: str) -> str:
        return f"{self.block}.{self.shared}.{projection}.weight"


def _mixtral(counts: Counts, window: Window) -> dict[str, Any]:
    return {
        "architectures": ["MixtralForCausalLM"],
        "model_type": "mixtral",
        "num_local_experts": counts.n_experts,
        "intermediate_size": counts.neurons,
        "output_router_logits": False,
        "router_aux_loss_coef": 0.001,
        "sliding_window": window.everywhere,
    }


def _qwen(counts: Counts) -> dict[str, Any]:
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


def _qwen2_moe(counts: Counts, window: Window) -> dict[str, Any]:
    return {
        "architectures": ["Qwen2MoeForCausalLM"],
        "model_type": "qwen2_moe",
        **_qwen(counts),
        "qkv_bias": True,
        "shared_expert_intermediate_size": counts.shared_neurons,
        "use_sliding_window": any(window.layers),
        "sliding_window": window.size,
        "max_window_layers": len(window.layers),
        "layer_types": ["sliding_attention" if slides else "full_attention" for slides in window.layers],
    }


def _qwen3_moe(counts: Counts, window: Window) -> dict[str, Any]:
    return {
        "architectures": ["Qwen3MoeForCausalLM"],
        "model_type": "qwen3_moe",
        **_qwen(counts),
        "use_sliding_window": window.everywhere is not None,
        "sliding_window": window.everywhere,
        "max_window_layers": len(window.layers),
    }


def _deepseek(counts: Counts, window: Window) -> dict[str, Any]:
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


LAYOUTS: dict[str, MoeLayout] = {
    "mixtral": MoeLayout(
        title="Mixtral",
        families=("llama", "mistral"),
        block="block_sparse_moe",
        names=("w1", "w3", "w2"),
        suffixes=(*_NORMS, *_ATTENTION),
        config=_mixtral,
    ),
    "qwen2_moe": MoeLayout(
        title="Qwen2-MoE",
        families=("qwen2", "llama", "mistral"),
        block="mlp",
        names=PROJECTIONS,
        suffixes=(*_NORMS, *_ATTENTION, *BIASES),
        config=_qwen2_moe,
        zero_biases=BIASES,
        shared="shared_expert",
        shared_gate=True,
        needs_shared=True,
        head_dim=False,
        mixed_window=True,
    ),
    "qwen3_moe": MoeLayout(
        title="Qwen3-MoE",
        families=("qwen3",),
        block="mlp",
        names=PROJECTIONS,
        suffixes=(*_NORMS, *_ATTENTION, "self_attn.q_norm.weight", "self_attn.k_norm.weight"),
        config=_qwen3_moe,
    ),
    "deepseek": MoeLayout(
        title="DeepSeek-MoE",
        families=("llama", "mistral"),
        block="mlp",
        names=PROJECTIONS,
        suffixes=(*_NORMS, *_ATTENTION),
        config=_deepseek,
        shared="shared_experts",
        ties=False,
        head_dim=False,
        files=("configuration_deepseek.py", "modeling_deepseek.py"),
    ),
}


def settled(config: Mapping[str, Any]) -> dict[str, Any]:
    """A dense model's config in which nothing is left to the defaults of its class."""
    full = {**_EVERYWHERE, **DEFAULTS[config["model_type"]], **copy.deepcopy(dict(config))}
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
    """Where a dense model (its config settled) attends to a window only."""
    n, family, types = config["num_hidden_layers"], config["model_type"], config.get("layer_types")
    has_switch = family in ("qwen2", "qwen3")
    size = config.get("sliding_window", 4096 if has_switch else None)
    if family == "llama" or size is None or (has_switch and not config.get("use_sliding_window")):
        return Window(None, (False,) * n)
    if isinstance(types, list) and len(types) == n:
        return Window(size, tuple(kind == "sliding_attention" for kind in types))
    first = config.get("max_window_layers", 28) if has_switch else 0
    return Window(size, tuple(i >= first for i in range(n)))


def moe_config(layout: MoeLayout, config: Mapping[str, Any], counts: Counts) -> dict[str, Any]:
    """The mixture's config: all that the dense model's (settled) says, and what the layout adds."""
    kept = {key: value for key, value in config.items() if key not in (*_WINDOW_KEYS, *_DENSE_ONLY)}
    if not layout.head_dim:
        kept.pop("head_dim", None)
    return {**kept, **layout.config(counts, window_of(config)), "num_experts_per_tok": counts.per_token}
