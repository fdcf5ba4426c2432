"""compressed-tensors (llm-compressor, vLLM): integers of 1 to 8 bits, packed or not, FP4 and FP8.

pack-quantized         W_packed (int32, a stream of codes in each row), W_scale, W_shape; W_zero_point, packed down its
                       columns, where codes are asymmetric; W_g_idx, the group of each column, with activation order
int-quantized, naive   W (int8), W_scale; W_zero_point (int8)
nvfp4-pack-quantized   W_packed (uint8), W_scale (FP8, one for 16), W_global_scale, which divides the scales
mxfp4-pack-quantized   W_packed (uint8), W_scale (exponents as uint8, one for 32)
float-quantized        W (FP8), W_scale; see fp8.py

What a weight is stored as is seen from its tensors, so models of mixed formats need nothing more. Weights of 2:4 or
bitmask sparsity, and weights that were rotated, are refused.

Source: compressed-tensors 0.20, compressors/.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping

import numpy as np

from merge.checkpoint.formats import Quantization, Tensors, fp8
from merge.checkpoint.parts import FLOATS, WeightParts, as_bytes, check_dtype, check_shape, check_sizes, small_text
from merge.dtypes import DTYPES
from merge.errors import CheckpointError
from merge.plan import Derived, TensorRef
from merge.quoting import quoted
from merge.sources.fp4 import fp4
from merge.sources.integers import integers

NAME = "compressed-tensors"
_METHODS = ("compressed-tensors", "compressed_tensors")
_PARTS = ("_packed", "_zero_point", "_g_idx", "_shape", "_global_scale")
_PLAIN = ("dense", None)


def recognises(quantization: Quantization | None, tensors: Tensors) -> bool:
    if quantization is None:
        return False
    return quantization.get("quant_method", _METHODS[0] if "config_groups" in quantization else None) in _METHODS


def sources(
    path: str, quantization: Quantization | None, tensors: Tensors
) -> tuple[dict[str, TensorRef], tuple[str, ...]]:
    settings = quantization or {}
    _refuse(path, settings)
    if settings.get("format") == "dense" or not fp8.group_weights(settings):
        return dict(tensors), ()
    parts = WeightParts(NAME, path, tensors)
    for name, ref in tensors.items():
        if name.endswith("_packed"):
            weight = _fp4(parts, ref) if ref.dtype == "U8" else _packed(parts, ref, settings)
            parts.put(ref, weight)
        elif ref.dtype == "I8" and f"{name}_scale" in tensors:
            parts.put(ref, _plain(parts, ref))
        elif ref.dtype == "I8" and name.endswith("weight"):
            parts.take(ref, f"{name}_scale")
    if not any(ref.dtype.startswith("F8_") for ref in parts.rest().values()):
        found, notes = parts.done((*_PARTS, "_scale"))
    else:
        found, more = fp8.sources(path, settings, parts.rest())
        notes = more if len(parts.rest()) == len(tensors) else (*parts.note(), *more)
    return found, notes


def _refuse(path: str, settings: Quantization) -> None:
    """Raises CheckpointError for what stores weights in a way that is not read."""
    sparsity, transform = settings.get("sparsity_config"), settings.get("transform_config")
    formats = [settings.get("format"), *(group.get("format") for group in _schemes(settings))]
    if isinstance(sparsity, Mapping):
        formats.append(sparsity.get("format"))
    for each in formats:
        if isinstance(each, str) and ("sparse" in each or "marlin" in each or "mxfp6" in each or "mxfp8" in each):
            raise CheckpointError(
                f"{path}/config.json: quantization_config: {quoted(each)} of {NAME} is not read. Dequantise the model "
                "first (to bf16), or name the original."
            )
    if isinstance(transform, Mapping) and transform.get("config_groups"):
        raise CheckpointError(
            f"{path}/config.json: quantization_config: weights are stored rotated (transform_config), which is not "
            "read. Dequantise the model first (to bf16), or name the original."
        )


def _schemes(settings: Quantization) -> Iterator[Mapping[str, object]]:
    groups = settings.get("config_groups")
    for group in groups.values() if isinstance(groups, Mapping) else ():
        if isinstance(group, Mapping):
            yield group


def _packed(parts: WeightParts, ref: TensorRef, settings: Quantization) -> Derived:
    check_dtype(ref, ("I32",))
    stem = ref.name.removesuffix("_packed")
    shape = _declared_shape(parts.take(ref, f"{stem}_shape"))
    if len(shape) < 2 or ref.shape[:-1] != shape[:-1] or 0 in shape:
        raise CheckpointError(
            f"{ref.file}: {ref.name}: {quoted(list(ref.shape))} does not hold a weight of {quoted(list(shape))}, which "
            f"{stem}_shape says. Download all files again."
        )
    bits = _bits(ref, shape[-1], settings)
    scale = parts.take(ref, f"{stem}_scale")
    check_dtype(scale, FLOATS)
    block = _block(scale, stem, shape)
    zeros, index = parts.find(f"{stem}_zero_point"), parts.find(f"{stem}_g_idx")
    if zeros is None and all(group.get("symmetric") is False for group in fp8.group_weights(settings)):
        parts.take(ref, f"{stem}_zero_point")
    is_packed = zeros is not None and zeros.dtype == "I32"
    if zeros is not None:
        _check_zeros(zeros, scale, stem, shape, bits)
    if index is not None:
        check_dtype(index, ("I32", "I64"))
        check_shape(index, shape[-1:], stem)
        if block[0] != 1:
            raise CheckpointError(f"{index.file}: {index.name}: the scales of {stem} are not in groups of columns.")
    return integers(
        stem,
        scale.dtype if scale.dtype != "F32" else "BF16",
        shape,
        as_bytes(ref),
        scale,
        bits=bits,
        block=block,
        row_bytes=ref.shape[-1] * 4,
        zeros=zeros,
        packed_zeros=is_packed,
        index=index,
    )


def _declared_shape(ref: TensorRef) -> tuple[int, ...]:
    """The numbers of W_shape, which belong into a header and lie in a tensor."""
    check_dtype(ref, ("I64", "I32"))
    numbers = np.frombuffer(small_text(ref), DTYPES[ref.dtype].numpy_name)
    return check_sizes(numbers.tolist(), ref)


def _bits(ref: TensorRef, columns: int, settings: Quantization) -> int:
    """The bits of a code: of those that the config has, those that fill the packed rows."""
    declared = [group.get("num_bits") for group in fp8.group_weights(settings) if group.get("type", "int") == "int"]
    fitting = [bits for bits in range(1, 9) if bits in declared and -(-columns * bits // 32) == ref.shape[-1]]
    if len(fitting) != 1:
        raise CheckpointError(
            f"{ref.file}: {ref.name}: {ref.shape[-1]:,} words a row for {columns:,} values, which is not what num_bits "
            f"of config.json ({quoted(declared)}) comes to. Download all files again."
        )
    return fitting[0]


def _block(scale: TensorRef, stem: str, shape: tuple[int, ...]) -> tuple[int, int]:
    """(rows, columns) that one scale covers: the weight, a row, or a group of a row."""
    rows, columns = math.prod(shape[:-1]), shape[-1]
    if scale.size == 1:
        return rows, columns
    grid = scale.shape if len(scale.shape) == len(shape) else (*scale.shape, 1)
    if grid[:-1] == shape[:-1] and grid[-1] and columns % grid[-1] == 0:
        return 1, columns // grid[-1]
    raise CheckpointError(
        f"{scale.file}: {scale.name}: {quoted(list(scale.shape))} scales do not fit {stem} {quoted(list(shape))}; "
        "expected one, one a row, or one for each of equal groups of a row. Download all files again."
    )


def _check_zeros(zeros: TensorRef, scale: TensorRef, stem: str, shape: tuple[int, ...], bits: int) -> None:
    check_dtype(zeros, ("I32", "I8"))
    if zeros.dtype == "I8":
        check_shape(zeros, scale.shape, stem)
        return
    if len(shape) != 2 or len(scale.shape) != 2 or scale.shape[0] != shape[0]:
        raise CheckpointError(
            f"{zeros.file}: {zeros.name}: packed zero points are read of matrices with scales of rows or groups only; "
            f"{stem} is {quoted(list(shape))}, with {quoted(list(scale.shape))} scales. Dequantise the model first."
        )
    check_shape(zeros, (-(-shape[0] * bits // 32), scale.shape[1]), stem)


def _plain(parts: WeightParts, ref: TensorRef) -> Derived:
    scale, zeros = parts.take(ref, f"{ref.name}_scale"), parts.find(f"{ref.name}_zero_point")
    check_dtype(scale, FLOATS)
    if len(ref.shape) < 2 or 0 in ref.shape:
        raise CheckpointError(f"{ref.file}: {ref.name}: INT8 of {quoted(list(ref.shape))}, expected a matrix.")
    block = _block(scale, ref.name, ref.shape)
    if zeros is not None:
        check_dtype(zeros, ("I8",))
        check_shape(zeros, scale.shape, ref.name)
    dtype = scale.dtype if scale.dtype != "F32" else "BF16"
    return integers(ref.name, dtype, ref.shape, ref, scale, bits=8, block=block, zeros=zeros)


def _fp4(parts: WeightParts, ref: TensorRef) -> Derived:
    stem = ref.name.removesuffix("_packed")
    if len(ref.shape) < 2:
        raise CheckpointError(f"{ref.file}: {ref.name}: FP4 of {quoted(list(ref.shape))}, expected a matrix of bytes.")
    shape = (*ref.shape[:-1], 2 * ref.shape[-1])
    scale = parts.take(ref, f"{stem}_scale")
    is_mx = scale.dtype == "U8"
    check_dtype(scale, ("U8",) if is_mx else ("F8_E4M3", *FLOATS))
    group = 32 if is_mx else 16
    if shape[-1] % group:
        raise CheckpointError(
            f"{ref.file}: {ref.name}: rows of {shape[-1]:,} numbers are not whole groups of {group}. "
            "Download the file again."
        )
    check_shape(scale, (*shape[:-1], shape[-1] // group), stem)
    if is_mx:
        return fp4(stem, "BF16", shape, as_bytes(ref), scale, group)
    whole = parts.take(ref, f"{stem}_global_scale")
    check_dtype(whole, ("F32",))
    if whole.size != 1:
        check_shape(whole, (1,), stem)
    return fp4(stem, "BF16", shape, as_bytes(ref), scale, group, overall="divide", more=(whole,))
