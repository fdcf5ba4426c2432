"""Converts float32 to the output dtype: one rounding, to nearest even, counting overflows and non-finite values.

`encode` also gives a tensor's statistics, so that the manifest costs no further pass.
"""

from __future__ import annotations

import numpy as np

from merge.arrays import F32, Array, Raw
from merge.dtypes import DTYPES
from merge.kernels.bits import Count, as_f32, count32, kernel, magnitude_bits, power_of_two, sign_bits, to_bf16, where

LANES = 64  # partial sums that do not wait for each other; their number is part of the result's definition
_INFINITY = 0x7F800000
# Formats that `_to_small` rounds to: mantissa bits, exponent bias, codes of the largest finite value, infinity and NaN.
_SMALL = {
    "F16": (10, 15, 0x7BFF, 0x7C00, 0x7E00),
    "F8_E4M3": (3, 7, 0x7E, 0x7F, 0x7F),
    "F8_E5M2": (2, 15, 0x7B, 0x7C, 0x7F),
}


def encode(values: Array, dtype: str, out: Array) -> tuple[int, int, float, float]:
    """Rounds a block into its output dtype.

    Args:
        values: (n,) float32, or float64 for float64 tensors.
        dtype: safetensors name of a float type.
        out: (n,) of the dtype's storage type; written.

    Returns:
        Counts of non-finite values and of finite values that overflow `dtype`, the largest finite magnitude and the sum
        of squares.
    """
    if values.dtype == np.float64:
        return _encode_wide(values, dtype, out)
    count, largest, squares = _statistics(values)
    nonfinite, overflow = int(count), 0
    if dtype == "BF16":
        overflow = int(_to_bf16(values, out)) - nonfinite
    elif dtype in _SMALL:
        overflow = _to_small(values, out.view(f"u{out.itemsize}"), *_SMALL[dtype]) - nonfinite
    else:
        assert DTYPES[dtype].is_float
        out[:] = values
    return nonfinite, overflow, float(np.uint32(largest).view(np.float32)), squares


def _encode_wide(values: Array, dtype: str, out: Array) -> tuple[int, int, float, float]:
    """`encode` of float64 values: plain numpy, for such tensors are rare and small."""
    finite = np.isfinite(values)
    nonfinite = int(values.size - finite.sum())
    largest = float(np.abs(values[finite]).max(initial=0.0))
    with np.errstate(over="ignore", invalid="ignore"):
        squares = float(np.square(values).sum())
    if dtype == "F64":
        out[:] = values
        return nonfinite, 0, largest, squares
    with np.errstate(over="ignore"):
        narrow = values.astype(np.float32)
    lost_here = int(values.size - np.isfinite(narrow).sum()) - nonfinite
    _, overflow, _, _ = encode(narrow, dtype, out)
    return nonfinite, overflow + lost_here, largest, squares


@kernel
def count_nonfinite(values: Raw) -> Count:
    """values (n,) uint16 bf16 or float32 -> number of NaN and infinities"""
    count = np.uint32(0)
    for i in range(values.shape[0]):
        count = count32(count, magnitude_bits(as_f32(values[i])) >= np.uint32(_INFINITY))
    return count


@kernel
def _statistics(values: F32) -> tuple[Count, Count, float]:
    """values (n,) float32 -> non-finite count, bits of the largest finite magnitude, sum of squares (float64)"""
    n = values.shape[0]
    lanes = np.zeros(LANES, np.float64)
    nonfinite = np.uint32(0)
    largest = np.uint32(0)
    for i in range(n):
        magnitude = magnitude_bits(values[i])
        nonfinite = count32(nonfinite, magnitude >= np.uint32(_INFINITY))
        largest = max(largest, where(magnitude < np.uint32(_INFINITY), magnitude, np.uint32(0)))
    for start in range(0, n, LANES):
        part = values[start : start + LANES]
        for lane in range(len(part)):
            lanes[lane] += np.float64(part[lane]) * np.float64(part[lane])
    return nonfinite, largest, lanes.sum()


@kernel
def _to_bf16(values: F32, out: Array) -> Count:
    """Rounds; returns how many results are not finite."""
    count = np.uint32(0)
    for i in range(values.shape[0]):
        rounded = to_bf16(values[i])
        out[i] = rounded
        count = count32(count, (rounded & np.uint16(0x7F80)) == np.uint16(0x7F80))
    return count


@kernel
def _to_small(values: F32, out: Array, mantissa_bits: int, bias: int, largest: int, infinity: int, nan: int) -> int:
    """Rounds into a format of 8 or 16 bits, subnormals included; returns how many results are not finite.

    A normal result is float32's bits with the exponent moved, rounded at the last mantissa bit kept; a carry moves into
    the exponent as it should. A subnormal one is a whole number of smallest steps: adding 2^23 steps leaves that
    number, rounded, in the low bits.
    """
    count = 0
    drop = 23 - mantissa_bits
    moved = (127 - bias) << mantissa_bits
    least_normal = (128 - bias) << 23
    steps = power_of_two(24 - bias - mantissa_bits)
    steps_bits = np.int64(magnitude_bits(steps))
    sign_shift = 31 - (15 if mantissa_bits == 10 else 7)
    for i in range(values.shape[0]):
        magnitude = np.int64(magnitude_bits(values[i]))
        normal = ((magnitude + (1 << (drop - 1)) - 1 + ((magnitude >> drop) & 1)) >> drop) - moved
        subnormal = np.int64(magnitude_bits(np.float32(abs(values[i]) + steps))) - steps_bits
        code = normal if magnitude >= least_normal else subnormal
        finite = code <= largest
        special = nan if magnitude > _INFINITY else infinity
        count += not finite
        out[i] = (code if finite else special) | (np.int64(sign_bits(values[i])) >> sign_shift)
    return count
