"""Gemma 2 and the text models of Gemma 3."""

from __future__ import annotations

from typing import TYPE_CHECKING

from merge.tools.to_gguf.families import Config, Family, number, rope

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


FAMILIES = (
    Family("gemma2", ("Gemma2ForCausalLM",), _gemma2, norm_plus_one=True),
    Family("gemma3", ("Gemma3ForCausalLM",), _gemma3, norm_plus_one=True),
)
