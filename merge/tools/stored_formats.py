"""The formats of `merge quantize`, for its flags, cards and documents; merge/tools/quantizers.py writes them."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class StoredFormat:
    """One format.

    Attributes:
        title: how weights are stored, in a model card.
        method: quant_method in config.json, by which transformers loads it; see merge.needs.
        on_cpu: what transformers does with the weights on CPU.
    """

    title: str
    method: str
    on_cpu: str


FORMATS = {
    "int8": StoredFormat(
        "INT8, a scale for each row (bitsandbytes)", "bitsandbytes", "runs in 8 bits, including activations"
    ),
    "int4": StoredFormat(
        "symmetric INT4 in groups of a row (compressed-tensors)", "compressed-tensors", "decodes them while loading"
    ),
    "nf4": StoredFormat("NF4, a scale for 64 weights (bitsandbytes)", "bitsandbytes", "runs from 4 bits"),
    "fp8": StoredFormat(
        "FP8 E4M3, a scale for each block of a matrix", "fp8", "decodes them to bfloat16 while loading"
    ),
}
