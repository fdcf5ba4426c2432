"""Packed codes -> numbers: values of 1 to 8 bits that lie in bytes or in 32-bit words.

A "stream" is the layout of most formats: value i has the bits from i * bits on, counted from the lowest of the first
byte (or word). Everything is vectorised; a loop is over the 8 or 32 places that repeat, never over values.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from merge.arrays import F32, U32

U8 = npt.NDArray[np.uint8]

# FP4 E2M1: sign, two bits of exponent, one of mantissa. Source: OCP Microscaling Formats 1.0, section 5.3.3
_E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
E2M1: F32 = np.array((*_E2M1, *(-value for value in _E2M1)), np.float32)
TABLE_PIECE = 65536  # bytes looked up at once: numpy makes 8-byte indices of them


def byte_table(values: F32, high_first: bool = False) -> F32:
    """values (2^bits,), bits a divisor of 8 -> (256, 8 / bits) float32: what a byte of such codes means, in order."""
    bits = len(values).bit_length() - 1
    shifts = np.arange(0, 8, bits)
    if high_first:
        shifts = shifts[::-1]
    codes = (np.arange(256)[:, None] >> shifts) & (len(values) - 1)
    table: F32 = values[codes]
    return table


def look_up(table: F32, raw: U8, out: F32) -> None:
    """raw (n,) -> out (n * table.shape[1],): the values of every byte, one after another."""
    per_byte = table.shape[1]
    rows = out.reshape(-1, per_byte)
    for place in range(0, len(raw), TABLE_PIECE):
        part = slice(place, place + TABLE_PIECE)
        np.take(table, raw[part], axis=0, out=rows[part], mode="clip")


def row_fields(raw: U8, bits: int, count: int) -> U8:
    """raw (rows, bytes): a stream in each row -> its first `count` values (rows, count)"""
    if bits == 8:
        return raw[:, :count]
    rows, n_bytes = raw.shape
    periods = -(-count // 8)  # 8 values take `bits` bytes
    padded = np.zeros((rows, periods * bits + 1), np.uint16)
    padded[:, : min(n_bytes, periods * bits)] = raw[:, : periods * bits]
    out = np.empty((rows, periods, 8), np.uint8)
    for place in range(8):
        byte, shift = divmod(place * bits, 8)
        value = padded[:, byte : byte + (periods - 1) * bits + 1 : bits] >> shift
        if shift + bits > 8:
            value = value | (padded[:, byte + 1 : byte + 2 + (periods - 1) * bits : bits] << (8 - shift))
        out[:, :, place] = value & ((1 << bits) - 1)
    return out.reshape(rows, periods * 8)[:, :count]


def column_fields(words: U32, bits: int, count: int) -> U8:
    """words (n, columns): a stream of words down each column -> its first `count` values (count, columns)"""
    columns = words.shape[1]
    periods = -(-count // 32)  # 32 values take `bits` words
    padded = words
    if len(words) < periods * bits:
        padded = np.zeros((periods * bits, columns), np.uint32)
        padded[: len(words)] = words
    groups = padded[: periods * bits].reshape(periods, bits, columns)
    out = np.empty((periods, 32, columns), np.uint8)
    for place in range(32):
        word, shift = divmod(place * bits, 32)
        value = groups[:, word] >> np.uint32(shift)
        if shift + bits > 32:
            value = value | (groups[:, word + 1] << np.uint32(32 - shift))
        out[:, place] = value & np.uint32((1 << bits) - 1)
    return out.reshape(periods * 32, columns)[:count]


def by_units(start: int, out: F32, unit: int, size: int, decode: Callable[[int, int, F32], None]) -> None:
    """Elements start.. of a flattened tensor of `size` elements, which is decoded by whole units of `unit` elements.

    Args:
        decode: decode(first, last, values): all elements of the units first .. last - 1; the tensor's last may be cut.
    """
    if not len(out):
        return
    first, last = start // unit, -(-(start + len(out)) // unit)
    begin, end = first * unit, min(last * unit, size)
    if (begin, end) == (start, start + len(out)):
        decode(first, last, out)
        return
    values = np.empty(end - begin, np.float32)
    decode(first, last, values)
    out[:] = values[start - begin :][: len(out)]
