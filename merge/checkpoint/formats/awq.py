"""AWQ of 4 bits in the layout "gemm", which AutoAWQ writes: W.qweight, W.qzeros and W.scales.

W.qweight (int32, [inputs, outputs / 8]), W.qzeros (int32, [groups, outputs / 8]), W.scales ([groups, outputs]).
Source: AutoAWQ, modules/linear/gemm.py and utils/packing_utils.py; merge/sources/packed_columns.py.
"""

from __future__ import annotations

from merge.checkpoint.formats import Quantization, Tensors
from merge.checkpoint.parts import FLOATS, WeightParts, check_dtype, check_shape
from merge.errors import CheckpointError
from merge.plan import Derived, TensorRef
from merge.quoting import quoted

NAME = "AWQ"
_PARTS = (".qweight", ".qzeros", ".scales")


def recognises(quantization: Quantization | None, tensors: Tensors) -> bool:
    return quantization is not None and quantization.get("quant_method") == "awq"


def sources(
    path: str, quantization: Quantization | None, tensors: Tensors
) -> tuple[dict[str, TensorRef], tuple[str, ...]]:
    settings = quantization or {}
    layout, bits = settings.get("version") or settings.get("format") or "gemm", settings.get("bits", 4)
    if not isinstance(layout, str) or layout.lower() != "gemm" or bits != 4:
        raise CheckpointError(
            f"{path}/config.json: quantization_config: AWQ of {quoted(bits)} bits in the layout {quoted(layout)} is "
            "not read; expected 4 and gemm. Dequantise the model first (to bf16), or name the original."
        )
    parts = WeightParts(NAME, path, tensors)
    for name, ref in tensors.items():
        if name.endswith(".qweight"):
            parts.put(ref, _weight(parts, ref))
    return parts.done(_PARTS)


def _weight(parts: WeightParts, ref: TensorRef) -> Derived:
    stem = ref.name.removesuffix(".qweight")
    zeros, scales = parts.take(ref, f"{stem}.qzeros"), parts.take(ref, f"{stem}.scales")
    check_dtype(ref, ("I32",))
    check_dtype(zeros, ("I32",))
    check_dtype(scales, FLOATS)
    if len(ref.shape) != 2 or 0 in ref.shape or len(scales.shape) != 2 or 0 in scales.shape:
        raise CheckpointError(
            f"{ref.file}: {ref.name}: {quoted(list(ref.shape))} with scales {quoted(list(scales.shape))}; expected two "
            "matrices. Download all files again."
        )
    (rows, words), groups = ref.shape, scales.shape[0]
    check_shape(scales, (groups, words * 8), ref.name)
    check_shape(zeros, (groups, words), ref.name)
    if rows % groups:
        raise CheckpointError(
            f"{scales.file}: {scales.name}: {groups:,} groups do not divide {rows:,} inputs. Download all files again."
        )
    parameters = {"layout": "awq", "bits": 4, "group": rows // groups, "index": False}
    dtype = scales.dtype if scales.dtype != "F32" else "F16"
    shape, inputs = (words * 8, rows), (ref, zeros, scales)
    return Derived(f"{stem}.weight", dtype, shape, "packed_columns", inputs, parameters, how="decoded")
