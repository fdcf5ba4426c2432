"""Llama and what is built like it: Mistral, Mixtral, SmolLM2 and 3, Granite."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from merge.gguf_layouts import Config, Family, head_dim, number, rope

if TYPE_CHECKING:
    from gguf import GGUFWriter


def _llama(writer: GGUFWriter, config: Config) -> None:
    writer.add_rope_dimension_count(head_dim(config))
    if "num_local_experts" in config:
        writer.add_expert_count(int(config["num_local_experts"]))
        writer.add_expert_used_count(int(number(config, "num_experts_per_tok")))


def _granite(writer: GGUFWriter, config: Config) -> None:
    _llama(writer, config)
    writer.add_attention_scale(float(number(config, "attention_multiplier", default=1.0)))
    writer.add_embedding_scale(float(number(config, "embedding_multiplier", default=1.0)))
    writer.add_residual_scale(float(number(config, "residual_multiplier", default=1.0)))
    writer.add_logit_scale(float(number(config, "logits_scaling", default=1.0)))


def _frequencies(config: Config) -> Mapping[str, list[float]]:
    """Divisors of the rotary frequencies of Llama 3.1. Source: transformers, modeling_rope_utils (llama3)."""
    parameters = rope(config)
    if (parameters.get("rope_type") or parameters.get("type")) != "llama3":
        return {}
    factor, low, high = (float(parameters[key]) for key in ("factor", "low_freq_factor", "high_freq_factor"))
    length = float(parameters["original_max_position_embeddings"])
    divisors = []
    for place in range(0, head_dim(config), 2):
        wave = 2 * math.pi * float(parameters["rope_theta"]) ** (place / head_dim(config))
        if wave < length / high:
            divisors.append(1.0)
        elif wave > length / low:
            divisors.append(factor)
        else:
            smooth = (length / wave - low) / (high - low)
            divisors.append(1 / ((1 - smooth) / factor + smooth))
    return {"rope_freqs.weight": divisors}


def scaling_of(config: Config, divisors: Sequence[float]) -> dict[str, Any] | None:
    """The parameters of Llama 3's scaling that give these divisors; None if none of those in use do."""
    for length in (8192, 4096, 2048, 16384, 32768):
        found: dict[str, Any] = {
            "rope_type": "llama3",
            "factor": float(f"{max(divisors, default=1.0):.6g}"),
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": length,
        }
        made = _frequencies({**config, "rope_parameters": {**config["rope_parameters"], **found}})["rope_freqs.weight"]
        if len(made) == len(divisors) and all(
            math.isclose(one, other, rel_tol=1e-5) for one, other in zip(made, divisors, strict=True)
        ):
            return found
    return None


def _mixtral_config(metadata: Config) -> dict[str, Any]:
    if "expert_count" not in metadata:
        return {"architectures": ["LlamaForCausalLM"], "model_type": "llama"}
    return {
        "architectures": ["MixtralForCausalLM"],
        "model_type": "mixtral",
        "num_local_experts": int(metadata["expert_count"]),
        "num_experts_per_tok": int(metadata["expert_used_count"]),
    }


def _granite_config(metadata: Config) -> dict[str, Any]:
    return {
        "architectures": ["GraniteForCausalLM"],
        "model_type": "granite",
        "attention_multiplier": float(metadata.get("attention.scale", 1.0)),
        "embedding_multiplier": float(metadata.get("embedding_scale", 1.0)),
        "residual_multiplier": float(metadata.get("residual_scale", 1.0)),
        "logits_scaling": float(metadata.get("logit_scale", 1.0)),
    }


_MIXTRAL = {
    "ffn_gate_inp": "block_sparse_moe.gate",
    "ffn_gate_exps": "block_sparse_moe.experts.{e}.w1",
    "ffn_up_exps": "block_sparse_moe.experts.{e}.w3",
    "ffn_down_exps": "block_sparse_moe.experts.{e}.w2",
}
FAMILIES = (
    Family(
        "llama",
        ("LlamaForCausalLM", "MistralForCausalLM", "MixtralForCausalLM"),
        _llama,
        permuted=True,
        extra=_frequencies,
        names=_MIXTRAL,
        config=_mixtral_config,
    ),
    Family(
        "smollm3",
        ("SmolLM3ForCausalLM",),
        _llama,
        permuted=True,
        extra=_frequencies,
        config=lambda metadata: {"architectures": ["SmolLM3ForCausalLM"], "model_type": "smollm3"},
    ),
    Family("granite", ("GraniteForCausalLM",), _granite, permuted=True, config=_granite_config),
)
