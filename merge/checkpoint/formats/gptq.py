"""GPTQ of 2, 3, 4 and 8 bits, with and without activation order; zeros of version 1 and 2.

W.qweight (int32, [inputs * bits / 32, outputs]), W.qzeros (int32, [groups, outputs * bits / 32]), W.scales ([groups,
outputs]) and W.g_idx (the group of each input; may be absent). Bits and groups are seen from the shapes, so modules may
differ ("dynamic"). What the zeros mean is what the config says in checkpoint_format: "gptq", where 1 less is stored, or
"gptq_v2".

Source: GPTQModel, nn_modules/qlinear/torch.py; merge/sources/packed_columns.py.
"""

from __future__ import annotations

from merge.checkpoint.formats import Quantization, Tensors
from merge.checkpoint.parts import FLOATS, WeightParts, check_dtype, check_shape
from merge.errors import CheckpointError
from merge.plan import Derived, TensorRef
from merge.quoting import quoted

NAME = "GPTQ"
_PARTS = (".qweight", ".qzeros", ".scales", ".g_idx")
_BITS = (2, 3, 4, 8)
_LAYOUTS = {"gptq": "gptq", "gptq_v2": "gptq_v2"}


def recognises(quantization: Quantization | None, tensors: Tensors) -> bool:
    return quantization is not None and quantization.get("quant_method") == "gptq"


def sources(
    path: str, quantization: Quantization | None, tensors: Tensors
) -> tuple[dict[str, TensorRef], tuple[str, ...]]:
    settings = quantization or {}
    format_ = settings.get("checkpoint_format") or settings.get("format") or "gptq"
    if settings.get("is_marlin_format") is True:
        format_ = "marlin"
    layout = _LAYOUTS.get(format_) if isinstance(format_, str) else None
    if layout is None:
        raise CheckpointError(
            f"{path}/config.json: quantization_config: GPTQ in the layout {quoted(format_)} is not read; expected "
            f"{' or '.join(_LAYOUTS)}. Dequantise the model first (to bf16), or name the original."
        )
    parts = WeightParts(NAME, path, tensors)
    for name, ref in tensors.items():
        if name.endswith(".qweight"):
            parts.put(ref, _weight(parts, ref, layout))
    return parts.done(_PARTS)


def _weight(parts: WeightParts, ref: TensorRef, layout: str) -> Derived:
    stem = ref.name.removesuffix(".qweight")
    zeros, scales = parts.take(ref, f"{stem}.qzeros"), parts.take(ref, f"{stem}.scales")
    index = parts.find(f"{stem}.g_idx")
    check_dtype(ref, ("I32",))
    check_dtype(zeros, ("I32",))
    check_dtype(scales, FLOATS)
    if any(len(each.shape) != 2 or 0 in each.shape for each in (ref, zeros, scales)):
        raise CheckpointError(
            f"{ref.file}: {ref.name}: {quoted(list(ref.shape))}, zeros {quoted(list(zeros.shape))} and scales "
            f"{quoted(list(scales.shape))}; expected three matrices. Download all files again."
        )
    groups, columns = scales.shape
    bits = zeros.shape[1] * 32 // columns
    rows = ref.shape[0] * 32 // max(bits, 1)
    if bits not in _BITS or zeros.shape[1] * 32 != columns * bits or ref.shape[0] * 32 != rows * bits:
        raise CheckpointError(
            f"{ref.file}: {ref.name}: {quoted(list(ref.shape))} with zeros {quoted(list(zeros.shape))} and scales "
            f"{quoted(list(scales.shape))} are not codes of 2, 3, 4 or 8 bits in int32. Dequantise the model first, or "
            "download all files again."
        )
    check_shape(ref, (rows * bits // 32, columns), f"{stem}.scales")
    check_shape(zeros, (groups, columns * bits // 32), f"{stem}.scales")
    if index is not None:
        check_dtype(index, ("I32", "I64"))
        check_shape(index, (rows,), f"{stem}.weight")
    elif rows % groups:
        raise CheckpointError(
            f"{scales.file}: {scales.name}: {groups:,} groups do not divide {rows:,} inputs, and {stem}.g_idx, which "
            "would say the group of each, is missing. Download all files again."
        )
    parameters = {"layout": layout, "bits": bits, "group": rows // groups, "index": index is not None}
    inputs = (ref, zeros, scales, *([index] if index is not None else []))
    dtype = scales.dtype if scales.dtype != "F32" else "F16"
    return Derived(f"{stem}.weight", dtype, (columns, rows), "packed_columns", inputs, parameters, how="decoded")
