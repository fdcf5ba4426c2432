"""blockwise: 4-bit codes of bitsandbytes (NF4, FP4): a table of 16 numbers, and a scale for each block of elements.

inputs: the packed codes as bytes, the first of two in the high bits; the scales of blocks ("absmax"); the table. Where
scales are quantised too (double quantisation), they are bytes, and two more inputs have the scales of their blocks and
their table of 256 numbers. parameters: `block`, elements of one scale; `nested_block`, scales of one scale; `offset`,
added to scales that were quantised.

value = table[code] * scale, scale = nested table[byte] * nested scale + offset; each rounded to float32.
Source: Dettmers et al., QLoRA (arXiv:2305.14314), section 3.
"""

from __future__ import annotations

import numpy as np

from merge.arrays import F32
from merge.chunks import Chunks
from merge.plan import Derived
from merge.sources import Fill, Read
from merge.unpack import TABLE_PIECE, by_units, byte_table, look_up


def prepare(ref: Derived, read: Read) -> Fill:
    codes, absmax, table_ref, *nested = ref.inputs
    block = ref.parameters["block"]
    values = np.empty(16, np.float32)
    read(table_ref, 0, values)
    table = byte_table(values, high_first=True)
    outer = [np.empty(part.size, np.float32) for part in nested]
    for part, numbers in zip(nested, outer, strict=True):
        read(part, 0, numbers)

    def scales(first: int, last: int) -> F32:
        """Of blocks first .. last - 1."""
        found = np.empty(last - first, np.float32)
        if not outer:
            read(absmax, first, found)
            return found
        raw = np.empty(last - first, np.uint8)
        read(absmax, first, raw)
        np.take(outer[1], raw, out=found, mode="clip")
        found *= outer[0][np.arange(first, last) // ref.parameters["nested_block"]]
        found += np.float32(ref.parameters["offset"])
        return found

    def decode(first: int, last: int, out: F32) -> None:
        raw = np.empty(-(-len(out) // 2), np.uint8)
        read(codes, first * block // 2, raw)
        if len(out) % 2:
            look_up(table, raw[:-1], out[:-1])
            out[-1] = table[raw[-1], 0]
        else:
            look_up(table, raw, out)
        with np.errstate(over="ignore", invalid="ignore"):  # counted later, with everything that is not finite
            mine = scales(first, last)
            whole = len(out) // block
            rows = out[: whole * block].reshape(whole, block)
            rows *= mine[:whole, None]
            out[whole * block :] *= mine[whole:]

    return lambda start, out: by_units(start, out, block, ref.size, decode)


def rounding(ref: Derived) -> float:
    return 0.094  # NF4, measured at blocks of 64: docs/tools.md


def held_bytes(ref: Derived) -> int:
    """Scales of scales; and of a chunk its bytes, scales and, where it is not whole blocks, its values."""
    block = int(ref.parameters["block"])
    chunk = Chunks.of(ref.shape).length + 2 * block
    per_block = 24 if len(ref.inputs) > 3 else 4
    return sum(4 * part.size for part in ref.inputs[3:]) + 5 * chunk + per_block * (chunk // block) + 8 * TABLE_PIECE
