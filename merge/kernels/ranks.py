"""The order of magnitudes in each row of a task vector, as a stable sort has it; what DELLA's probabilities go by.

numpy sorts whole numbers in vector registers, so each entry becomes one: its magnitude in the upper bits and its place
in the row in the lower ones, which also makes the sort stable. 32 bits are sorted twice as fast as 64, and magnitudes
fit what the place leaves of them if they are taken as multiples of one step of the row: most task vectors of bfloat16
models are multiples of a large enough one. Rows where that loses bits, or with numbers that are not finite, take 64.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from merge.kernels.bits import as_f32, kernel, magnitude_bits, power_of_two
from merge.kernels.scratch import Scratch

_LONGEST = 1 << 16  # entries of a row that 32 bits are tried for
Keys = npt.NDArray[Any]


_scratch = Scratch()


def sorted_rows(base: Any, tuned: Any, length: int) -> tuple[Keys, Any]:
    """base, tuned (rows * length,) -> (keys (rows, length) uint32, mask): keys[row, rank] & mask is that entry's place.

    Ranks rise with the magnitude of tuned - base; of equal ones the earlier has the lower. NaN counts as largest. The
    keys are valid until the same thread's next call.
    """
    n_rows = len(base) // length
    place_bits = (length - 1).bit_length()
    keys: Keys = _scratch.array("keys", n_rows * length, np.uint32).reshape(n_rows, length)
    wide = np.ones(n_rows, np.bool_)
    if length <= _LONGEST:
        _pack(base, tuned, place_bits, keys, wide)
        if 2 * int(wide.sum()) <= n_rows:
            keys.sort(axis=1)
        else:
            wide[:] = True
    rows = np.flatnonzero(wide)
    if len(rows):
        wider = _scratch.array("wider", len(rows) * length, np.uint64).reshape(len(rows), length)
        _pack_wide(base, tuned, rows, wider)
        wider.sort(axis=1)
        _take_places(wider, rows, keys)
    return keys, np.uint32((1 << place_bits) - 1)


@kernel
def _pack(base: Any, tuned: Any, place_bits: int, keys: Any, wide: Any) -> None:
    """Fills keys (rows, length) uint32; wide (rows,) bool: whether a row's magnitudes do not fit."""
    length = keys.shape[1]
    for row in range(keys.shape[0]):
        b, x, out = base[row * length : (row + 1) * length], tuned[row * length : (row + 1) * length], keys[row]
        most = np.uint32(0)
        for i in range(length):
            most = max(most, magnitude_bits(as_f32(x[i]) - as_f32(b[i])))
        # The largest magnitude is below 2^(exponent + 1), and 2^shift takes that to what 32 - place_bits bits hold. A
        # sign bit stays free, for conversion to signed integers is what processors have.
        exponent = np.int64(most >> np.uint32(23)) - 127
        shift: Any = min(32 - place_bits, 31) - 1 - exponent if most > 0 else 0
        wide[row] = most >= np.uint32(0x7F800000) or abs(shift) > 126
        if wide[row]:
            continue
        scale, back = power_of_two(shift), power_of_two(-shift)
        lost = 0
        for i in range(length):
            size = abs(as_f32(x[i]) - as_f32(b[i]))
            step = np.int32(size * scale)
            lost += np.float32(step) * back != size
            out[i] = (np.uint32(step) << np.uint32(place_bits)) | np.uint32(i)
        wide[row] = lost > 0


@kernel
def _pack_wide(base: Any, tuned: Any, rows: Any, keys: Any) -> None:
    """Fills keys (len(rows), length) uint64 for those rows."""
    length = keys.shape[1]
    for k in range(len(rows)):
        start = rows[k] * length
        b, x, out = base[start : start + length], tuned[start : start + length], keys[k]
        for i in range(length):
            out[i] = (np.uint64(magnitude_bits(as_f32(x[i]) - as_f32(b[i]))) << np.uint64(32)) | np.uint64(i)


@kernel
def _take_places(wide: Any, rows: Any, keys: Any) -> None:
    for k in range(len(rows)):
        out, ordered = keys[rows[k]], wide[k]
        for rank in range(len(ordered)):
            out[rank] = np.uint32(ordered[rank] & np.uint64(0xFFFFFFFF))
