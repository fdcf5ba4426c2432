"""Qwen 2 and 3, dense and mixtures."""

from __future__ import annotations

from typing import TYPE_CHECKING

from merge.errors import UsageError
from merge.tools.to_gguf.families import Config, Family, number

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


FAMILIES = (
    Family("qwen2", ("Qwen2ForCausalLM",)),
    Family("qwen3", ("Qwen3ForCausalLM",)),
    Family("qwen2moe", ("Qwen2MoeForCausalLM",), _experts),
    Family("qwen3moe", ("Qwen3MoeForCausalLM",), _experts),
)
