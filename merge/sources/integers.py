"""integers: whole numbers of 1 to 8 bits times scales, each of a block of a matrix.

inputs: the codes; the scales; where `has_zeros`, the codes that mean zero. parameters:
    bits, columns: of a code, and of a row of the weight; with 8 bits codes are int8 as they are, else each row is a
        stream (merge/unpack.py) of `row_bytes` bytes whose codes are 2^(bits - 1) too large.
    block: (rows, columns) that one scale covers; `grid`: shape of the scales.
    packed_zeros: zeros are streams of words down the columns of the grid, and 2^(bits - 1) too large as well.
    divisor: scales are divided by it (127: the scale is a row's largest magnitude, bitsandbytes).
    index: the last input gives the group of each column of the weight (activation order).

value = (code - zero) * scale, rounded to float32 once.
"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

from merge.arrays import F32
from merge.chunks import Chunks
from merge.decode import apply_scales
from merge.dtypes import DTYPES
from merge.errors import CheckpointError
from merge.plan import Derived, TensorRef
from merge.sources import Fill, Read, rounding_to_steps
from merge.unpack import TABLE_PIECE, U8, by_units, byte_table, column_fields, look_up, row_fields


def integers(
    name: str,
    dtype: str,
    shape: tuple[int, ...],
    codes: TensorRef,
    scale: TensorRef,
    *,
    bits: int,
    block: tuple[int, int],
    row_bytes: int = 0,
    zeros: TensorRef | None = None,
    packed_zeros: bool = False,
    divisor: int = 1,
    index: TensorRef | None = None,
) -> Derived:
    """The weight's values; an output that keeps its input's dtype gets `dtype`."""
    rows, columns = math.prod(shape[:-1]), shape[-1]
    parameters = {
        "bits": bits,
        "row_bytes": row_bytes,
        "block": block,
        "grid": (-(-rows // block[0]), -(-columns // block[1])),
        "has_zeros": zeros is not None,
        "packed_zeros": packed_zeros,
        "divisor": divisor,
        "index": index is not None,
    }
    inputs = (codes, scale, *(each for each in (zeros, index) if each is not None))
    return Derived(name, dtype, shape, "integers", inputs, parameters, how="decoded")


def prepare(ref: Derived, read: Read) -> Fill:
    columns = ref.shape[-1]
    block, bits = ref.parameters["block"], ref.parameters["bits"]
    table = None
    if bits in (1, 2, 4) and ref.parameters["row_bytes"] * 8 == columns * bits:  # no padding, no code in two bytes
        table = byte_table(np.arange(1 << bits, dtype=np.float32) - np.float32(1 << (bits - 1)))
    group_of = _index(ref, read) if ref.parameters["index"] else None

    def decode(first: int, last: int, out: F32) -> None:
        """Rows first .. last - 1."""
        values = out.reshape(last - first, columns)
        if table is not None:
            look_up(table, _packed(ref, read, first, last), out)
        elif ref.parameters["row_bytes"]:
            raw = _packed(ref, read, first, last).reshape(last - first, -1)
            values[:] = row_fields(raw, bits, columns)
            values -= np.float32(1 << (bits - 1))
        else:
            codes = np.empty(len(out), DTYPES[ref.inputs[0].dtype].numpy_name)
            read(ref.inputs[0], first * columns, codes)
            out[:] = codes
        top = first // block[0]
        scales = _grid(ref, read, 1, top, -(-last // block[0])) / np.float32(ref.parameters["divisor"])
        zeros = _zeros(ref, read, top, -(-last // block[0]))
        with np.errstate(over="ignore", invalid="ignore"):  # counted later, with everything that is not finite
            if group_of is not None:
                if zeros is not None:
                    values -= zeros[:, group_of]
                values *= scales[:, group_of]
                return
            start = (first - top * block[0]) * columns
            if zeros is not None:
                apply_scales(out, start, columns, block, zeros, np.subtract)
            apply_scales(out, start, columns, block, scales)

    return lambda start, out: by_units(start, out, columns, ref.size, decode)


def _packed(ref: Derived, read: Read, first: int, last: int) -> U8:
    """The bytes of rows first .. last - 1."""
    row_bytes = ref.parameters["row_bytes"]
    raw = np.empty((last - first) * row_bytes, np.uint8)
    read(ref.inputs[0], first * row_bytes, raw)
    return raw


def _grid(ref: Derived, read: Read, place: int, top: int, bottom: int) -> F32:
    """Rows top .. bottom - 1 of a part that has a number for each block."""
    part, width = ref.inputs[place], ref.parameters["grid"][1]
    values = np.empty((bottom - top) * width, np.float32)
    if DTYPES[part.dtype].is_float:
        read(part, top * width, values)
    else:
        raw = np.empty(len(values), DTYPES[part.dtype].numpy_name)
        read(part, top * width, raw)
        values[:] = raw
    return values.reshape(bottom - top, width)


def _zeros(ref: Derived, read: Read, top: int, bottom: int) -> F32 | None:
    if not ref.parameters["has_zeros"]:
        return None
    if not ref.parameters["packed_zeros"]:
        return _grid(ref, read, 2, top, bottom)
    part, bits = ref.inputs[2], ref.parameters["bits"]
    n_words, width = part.shape
    begin = top // 32  # 32 values take `bits` words
    end = min(-(-bottom // 32) * bits, n_words)
    words = np.empty((end - begin * bits) * width, np.int32)
    read(part, begin * bits * width, words)
    found = column_fields(words.view(np.uint32).reshape(-1, width), bits, bottom - begin * 32)
    return found[top - begin * 32 :].astype(np.float32) - np.float32(1 << (bits - 1))


def _index(ref: Derived, read: Read) -> npt.NDArray[np.int64]:
    part, groups = ref.inputs[-1], ref.parameters["grid"][1]
    found = np.empty(part.size, DTYPES[part.dtype].numpy_name)
    read(part, 0, found)
    if len(found) and not (found.min() >= 0 and found.max() < groups):
        raise CheckpointError(
            f"{part.file}: {part.name}: names groups {found.min()} to {found.max()}; {ref.name} has {groups}. "
            "Download the file again."
        )
    return found.astype(np.int64)


def rounding(ref: Derived) -> float:
    return rounding_to_steps(ref.parameters["bits"], int(ref.parameters["block"][0]) * int(ref.parameters["block"][1]))


def held_bytes(ref: Derived) -> int:
    """Of a chunk the codes, packed and not, with scales and zeros; its values once more where it is not whole rows."""
    chunk = Chunks.of(ref.shape).length
    columns = ref.shape[-1]
    rows = -(-chunk // max(columns, 1)) + 1
    block, width = ref.parameters["block"], int(ref.parameters["grid"][1])
    grid = (rows // int(block[0]) + 2) * width
    index = 8 * (rows * columns + columns) if ref.parameters["index"] else 0
    packed = 4 * rows * columns if ref.parameters["row_bytes"] else rows * columns
    return packed + 8 * TABLE_PIECE + 4 * columns * rows + grid * (40 if ref.parameters["has_zeros"] else 8) + index
