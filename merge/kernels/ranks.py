"""Ranks of magnitudes in each row of a task vector, by a stable sort; DELLA's probabilities depend on them.

numpy sorts whole numbers in vector registers, so each entry becomes one: its magnitude in the upper bits and its place
in the row in the lower ones, which also makes the sort stable. 32 bits are sorted twice as fast as 64, so magnitudes
are taken as multiples of one step of the row, rounded down, with a bit that says whether anything was lost. What is not
a multiple then comes after what is, and only two such entries within one step may be in the wrong order: they are few,
and are put right afterwards. Rows where they are many, or with numbers that are not finite, take 64 bits.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from merge.arrays import I64, U32, U64, Bools, Raw
from merge.kernels.bits import add32, as_f32, count32, kernel, magnitude_bits, power_of_two, where
from merge.kernels.scratch import Scratch

_LONGEST = 1 << 16  # entries of a row that 32 bits are tried for
_UNCLEAR = 16  # one in so many may be out of order before its row is sorted again


_scratch = Scratch()


def sorted_rows(base: Raw, tuned: Raw, length: int) -> tuple[U32, np.uint32]:
    """base, tuned (rows * length,) -> (keys (rows, length) uint32, mask): keys[row, rank] & mask is that entry's place.

    Ranks rise with the magnitude of tuned - base; of equal ones the earlier has the lower. NaN counts as largest. The
    keys are valid until the same thread's next call.
    """
    n_rows = len(base) // length
    place_bits = (length - 1).bit_length()
    keys = _scratch.array("keys", n_rows * length, np.uint32).reshape(n_rows, length)
    wide = np.ones(n_rows, np.bool_)
    if length <= _LONGEST:
        _pack(base, tuned, place_bits, keys, wide)
        keys.sort(axis=1)
        _repair(base, tuned, place_bits, keys, wide)
    rows = np.flatnonzero(wide)
    if len(rows):
        wider = _scratch.array("wider", len(rows) * length, np.uint64).reshape(len(rows), length)
        _pack_wide(base, tuned, rows, wider)
        wider.sort(axis=1)
        _take_places(wider, rows, keys)
    return keys, np.uint32((1 << place_bits) - 1)


@kernel
def _pack(base: Raw, tuned: Raw, place_bits: int, keys: U32, wide: Bools) -> None:
    """Fills keys (rows, length) uint32; wide (rows,) bool: whether a row's magnitudes cannot be taken as multiples."""
    length = keys.shape[1]
    for row in range(keys.shape[0]):
        b, x, out = base[row * length : (row + 1) * length], tuned[row * length : (row + 1) * length], keys[row]
        most = np.uint32(0)
        for i in range(length):
            most = max(most, magnitude_bits(as_f32(x[i]) - as_f32(b[i])))
        # The largest magnitude is below 2^(exponent + 1), and 2^shift takes that to what 31 - place_bits bits hold.
        exponent = np.int64(most >> np.uint32(23)) - 127
        shift: Any = 30 - place_bits - exponent if most > 0 else 0
        wide[row] = most >= np.uint32(0x7F800000) or abs(shift) > 126
        if wide[row]:
            continue
        scale, back = power_of_two(shift), power_of_two(-shift)
        for i in range(length):
            size = abs(as_f32(x[i]) - as_f32(b[i]))
            step = np.int32(size * scale)
            lost = where(np.float32(step) * back != size, np.uint32(1), np.uint32(0))
            out[i] = (((np.uint32(step) << np.uint32(1)) | lost) << np.uint32(place_bits)) | np.uint32(i)


@kernel
def _repair(base: Raw, tuned: Raw, place_bits: int, keys: U32, wide: Bools) -> None:
    """Orders entries of one step that lost something; wide: also rows where they are many."""
    length = keys.shape[1]
    place = np.uint32((1 << place_bits) - 1)
    for row in range(keys.shape[0]):
        if wide[row]:
            continue
        start, ordered, before = row * length, keys[row, 1:], keys[row, :-1]
        n_unclear = np.uint32(0)
        for i in range(length - 1):
            lost = (ordered[i] & add32(place, np.uint32(1))) != 0
            n_unclear = count32(n_unclear, ((ordered[i] ^ before[i]) <= place) & lost)
        wide[row] = n_unclear > length // _UNCLEAR
        if wide[row] or n_unclear == 0:
            continue
        for rank in range(1, length):
            key = keys[row, rank]
            if (key ^ keys[row, rank - 1]) > place or (key & (place + np.uint32(1))) == 0:
                continue
            i = start + np.int64(key & place)
            size = magnitude_bits(as_f32(tuned[i]) - as_f32(base[i]))
            to = rank
            while to > 0 and (key ^ keys[row, to - 1]) <= place:
                other = start + np.int64(keys[row, to - 1] & place)
                if magnitude_bits(as_f32(tuned[other]) - as_f32(base[other])) <= size:
                    break
                keys[row, to] = keys[row, to - 1]
                to -= 1
            keys[row, to] = key


@kernel
def _pack_wide(base: Raw, tuned: Raw, rows: I64, keys: U64) -> None:
    """Fills keys (len(rows), length) uint64 for those rows."""
    length = keys.shape[1]
    for k in range(len(rows)):
        start = rows[k] * length
        b, x, out = base[start : start + length], tuned[start : start + length], keys[k]
        for i in range(length):
            out[i] = (np.uint64(magnitude_bits(as_f32(x[i]) - as_f32(b[i]))) << np.uint64(32)) | np.uint64(i)


@kernel
def _take_places(wide: U64, rows: I64, keys: U32) -> None:
    for k in range(len(rows)):
        out, ordered = keys[rows[k]], wide[k]
        for rank in range(len(ordered)):
            out[rank] = np.uint32(ordered[rank] & np.uint64(0xFFFFFFFF))
