"""Qwen 2 and 3, dense and mixtures."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from merge.errors import UsageError
from merge.gguf_layouts import Config, Family, number

if TYPE_CHECKING:
    from gguf import GGUFWriter


def _experts(writer: GGUFWriter, config: Config) -> None:
    if config.get("decoder_sparse_step", 1) != 1 or config.get("mlp_only_layers"):
        raise UsageError(
            "config.json: decoder_sparse_step and mlp_only_layers: llama.cpp has no dense layers in these."
        )
    writer.add_expert_count(int(number(config, "num_experts", "num_local_experts")))
    writer.add_expert_used_count(int(number(config, "num_experts_per_tok")))
    writer.add_expert_feed_forward_length(int(number(config, "moe_intermediate_size")))
    if config.get("shared_expert_intermediate_size"):
        writer.add_expert_shared_feed_forward_length(int(config["shared_expert_intermediate_size"]))


def _named(name: str, kind: str) -> Callable[[Config], dict[str, Any]]:
    def config(metadata: Config) -> dict[str, Any]:
        found: dict[str, Any] = {"architectures": [name], "model_type": kind}
        if "expert_count" in metadata:
            found |= {
                "num_experts": int(metadata["expert_count"]),
                "num_experts_per_tok": int(metadata["expert_used_count"]),
                "moe_intermediate_size": int(metadata["expert_feed_forward_length"]),
                "norm_topk_prob": kind == "qwen3_moe",
                "decoder_sparse_step": 1,
                "mlp_only_layers": [],
            }
        if "expert_shared_feed_forward_length" in metadata:
            found["shared_expert_intermediate_size"] = int(metadata["expert_shared_feed_forward_length"])
        return found

    return config


_EXPERTS = {
    "ffn_gate_inp": "mlp.gate",
    "ffn_gate_exps": "mlp.experts.{e}.gate_proj",
    "ffn_up_exps": "mlp.experts.{e}.up_proj",
    "ffn_down_exps": "mlp.experts.{e}.down_proj",
    "ffn_gate_inp_shexp": "mlp.shared_expert_gate",
    "ffn_gate_shexp": "mlp.shared_expert.gate_proj",
    "ffn_up_shexp": "mlp.shared_expert.up_proj",
    "ffn_down_shexp": "mlp.shared_expert.down_proj",
}
FAMILIES = (
    Family("qwen2", ("Qwen2ForCausalLM",), config=_named("Qwen2ForCausalLM", "qwen2")),
    Family("qwen3", ("Qwen3ForCausalLM",), config=_named("Qwen3ForCausalLM", "qwen3")),
    Family(
        "qwen2moe",
        ("Qwen2MoeForCausalLM",),
        _experts,
        names=_EXPERTS,
        config=_named("Qwen2MoeForCausalLM", "qwen2_moe"),
    ),
    Family(
        "qwen3moe",
        ("Qwen3MoeForCausalLM",),
        _experts,
        names=_EXPERTS,
        config=_named("Qwen3MoeForCausalLM", "qwen3_moe"),
    ),
)
