"""Gemma 2 and the text models of Gemma 3."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from merge.gguf_layouts import Config, Family, number, rope

if TYPE_CHECKING:
    from gguf import GGUFWriter


def _gemma2(writer: GGUFWriter, config: Config) -> None:
    writer.add_attn_logit_softcapping(float(number(config, "attn_logit_softcapping", default=50.0)))
    writer.add_final_logit_softcapping(float(number(config, "final_logit_softcapping", default=30.0)))
    writer.add_sliding_window(int(number(config, "sliding_window")))


def _gemma3(writer: GGUFWriter, config: Config) -> None:
    if config.get("final_logit_softcapping"):
        writer.add_final_logit_softcapping(float(config["final_logit_softcapping"]))
    writer.add_sliding_window(int(number(config, "sliding_window")))
    writer.add_rope_freq_base_swa(float(rope(config, "sliding_attention").get("rope_theta", 10000.0)))


def _gemma2_config(metadata: Config) -> dict[str, Any]:
    return {
        "architectures": ["Gemma2ForCausalLM"],
        "model_type": "gemma2",
        "attn_logit_softcapping": float(metadata.get("attn_logit_softcapping", 50.0)),
        "final_logit_softcapping": float(metadata.get("final_logit_softcapping", 30.0)),
        "sliding_window": int(metadata["attention.sliding_window"]),
        "query_pre_attn_scalar": int(metadata["attention.key_length"]),
    }


def _gemma3_config(metadata: Config) -> dict[str, Any]:
    base = float(metadata.get("rope.freq_base", 1_000_000.0))
    swa = float(metadata.get("rope.freq_base_swa", 10000.0))
    return {
        "architectures": ["Gemma3ForCausalLM"],
        "model_type": "gemma3_text",
        "sliding_window": int(metadata["attention.sliding_window"]),
        "query_pre_attn_scalar": int(metadata["attention.key_length"]),
        "rope_parameters": {
            "full_attention": {"rope_type": "default", "rope_theta": base},
            "sliding_attention": {"rope_type": "default", "rope_theta": swa},
        },
    }


_NORMS = {
    "ffn_norm": "pre_feedforward_layernorm",
    "post_attention_norm": "post_attention_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}
FAMILIES = (
    Family("gemma2", ("Gemma2ForCausalLM",), _gemma2, norm_plus_one=True, names=_NORMS, config=_gemma2_config),
    Family("gemma3", ("Gemma3ForCausalLM",), _gemma3, norm_plus_one=True, names=_NORMS, config=_gemma3_config),
)
