"""MXFP4 of gpt-oss: W_blocks and W_scales, for stacks of experts that transformers has transposed.

W_blocks (uint8, [experts, columns, groups, 16]): two FP4 numbers a byte; W_scales (uint8, [experts, columns, groups]):
exponents. The weight is [experts, groups * 32, columns].
Source: transformers, integrations/mxfp4.py; merge/sources/fp4.py.
"""

from __future__ import annotations

from merge.checkpoint.formats import Quantization, Tensors
from merge.checkpoint.parts import WeightParts, as_bytes, check_dtype, check_shape
from merge.errors import CheckpointError
from merge.plan import TensorRef
from merge.quoting import quoted
from merge.sources.fp4 import fp4

NAME = "MXFP4"
_GROUP = 32


def recognises(quantization: Quantization | None, tensors: Tensors) -> bool:
    if quantization is not None:
        return quantization.get("quant_method") == "mxfp4"
    return any(name.endswith("_blocks") and f"{name[:-7]}_scales" in tensors for name in tensors)


def sources(
    path: str, quantization: Quantization | None, tensors: Tensors
) -> tuple[dict[str, TensorRef], tuple[str, ...]]:
    parts = WeightParts(NAME, path, tensors)
    for name, ref in tensors.items():
        if not name.endswith("_blocks"):
            continue
        stem = name.removesuffix("_blocks")
        scales = parts.take(ref, f"{stem}_scales")
        check_dtype(ref, ("U8",))
        check_dtype(scales, ("U8",))
        if len(ref.shape) != 4 or ref.shape[3] != _GROUP // 2 or 0 in ref.shape:
            raise CheckpointError(
                f"{ref.file}: {name}: {quoted(list(ref.shape))}, expected [experts, columns, groups, {_GROUP // 2}]. "
                "Download all files again."
            )
        check_shape(scales, ref.shape[:3], name)
        experts, columns, groups, _ = ref.shape
        shape = (experts, groups * _GROUP, columns)
        parts.put(ref, fp4(stem, "BF16", shape, as_bytes(ref), scales, _GROUP, transposed=True))
    return parts.done(("_blocks", "_scales"))
