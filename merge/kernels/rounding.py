"""Measures the effect of rounding to another dtype while numbers are written, for `merge convert`."""

from __future__ import annotations

import numpy as np

from merge.arrays import F32, F64, Array
from merge.decode import to_float32
from merge.kernels.bits import kernel, where
from merge.kernels.encode import LANES

N_SUMS = 5


def rounding_sums(values: Array, dtype: str, encoded: Array) -> F64:
    """Compares numbers with what was stored for them; those that are not finite on either side are left out.

    Args:
        values: (n,) float32, or float64, before rounding.
        dtype: safetensors name; encoded: (n,) the stored numbers.

    Returns:
        (5,) float64: how many changed, how many became zero, the largest relative change of those that did not, the sum
        of squared changes, and the sum of squares before.
    """
    out = np.zeros(N_SUMS)
    if dtype == "F64":
        return out
    rounded = np.empty(len(values), np.float32)
    to_float32(dtype, encoded, rounded)
    if values.dtype == np.float32:
        _sums(values, rounded, out)
        return out
    finite = np.isfinite(values) & np.isfinite(rounded)
    before, change = values[finite], np.abs(rounded[finite] - values[finite])
    zero = (before != 0) & (rounded[finite] == 0)
    kept = (before != 0) & ~zero
    largest = float((change[kept] / np.abs(before[kept])).max(initial=0.0))
    out[:] = np.count_nonzero(change), np.count_nonzero(zero), largest, np.square(change).sum(), np.square(before).sum()
    return out


@kernel
def _sums(values: F32, rounded: F32, out: F64) -> None:
    lanes = np.zeros((N_SUMS, LANES), np.float64)
    changed, flushed, largest, changes, squares = lanes[0], lanes[1], lanes[2], lanes[3], lanes[4]
    for start in range(0, values.shape[0], LANES):
        before, after = values[start : start + LANES], rounded[start : start + LANES]
        for lane in range(len(before)):
            x, y = np.float64(before[lane]), np.float64(after[lane])
            change = abs(y - x)
            finite = change < np.inf  # neither side NaN or infinite
            changed[lane] += where(finite & (change > 0), 1.0, 0.0)
            flushed[lane] += where(finite & (x != 0) & (y == 0), 1.0, 0.0)
            relative = where(finite & (x != 0) & (y != 0), change / abs(x), 0.0)
            largest[lane] = where(relative > largest[lane], relative, largest[lane])
            changes[lane] += where(finite, change * change, 0.0)
            squares[lane] += where(finite, x * x, 0.0)
    for k in range(N_SUMS):
        out[k] = lanes[k].sum()
    out[2] = largest.max()
