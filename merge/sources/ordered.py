"""ordered: a tensor whose rows or columns are read in another order, by bounded reads.

inputs: the tensor; the order of its units (place -> the unit that goes there), a whole number of rows or columns each.
parameters: `axis`, 0: rows, 1: columns of a matrix.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

from merge.arrays import I64
from merge.plan import Derived, TensorRef
from merge.sources import Fill, Read

# contiguous(start, out): the elements from `start` on, as they are stored.
Contiguous = Callable[[int, npt.NDArray[Any]], None]


def ordered(ref: TensorRef, order: TensorRef, axis: int) -> TensorRef:
    """The tensor with its rows (axis 0) or columns (1) in the order of their units."""
    return Derived(ref.name, ref.dtype, ref.shape, "ordered", (ref, order), {"axis": axis}, how="rearranged")


def prepare(ref: Derived, read: Read) -> Fill:
    (source, order), axis = ref.inputs, ref.parameters["axis"]
    units: npt.NDArray[Any] = np.empty(order.size, np.int64)
    read(order, 0, units)
    width = ref.shape[axis] // len(units)
    index = (units[:, None] * width + np.arange(width)).reshape(-1)

    def contiguous(start: int, out: npt.NDArray[Any]) -> None:
        read(source, start, out)

    return lambda start, out: read_ordered(ref.shape, axis, index, start, out, contiguous)


def held_bytes(ref: Derived) -> int:
    """The order of the entries, and a row."""
    axis: int = ref.parameters["axis"]
    return 16 * ref.shape[axis] + 8 * math.prod(ref.shape[1:])


def read_ordered(
    shape: tuple[int, ...], axis: int, index: I64, start: int, out: npt.NDArray[Any], read: Contiguous
) -> None:
    """Elements start.. of the flattened, permuted tensor -> out (n,); memory: one row, for columns."""
    length = math.prod(shape[1:])
    row_buffer = np.empty(length, out.dtype) if axis else None
    place = 0
    while place < len(out):
        row, column = divmod(start + place, length)
        count = min(length - column, len(out) - place)
        piece = out[place : place + count]
        if row_buffer is not None:
            read(row * length, row_buffer)
            np.take(row_buffer, index[column : column + count], out=piece, mode="clip")  # "raise" would copy
        elif column or count < length:
            read(int(index[row]) * length + column, piece)
        else:
            run = _run(index[row : row + (len(out) - place) // length])
            piece, count = out[place : place + run * length], run * length
            read(int(index[row]) * length, piece)
        place += count


def _run(index: I64) -> int:
    """How many entries from the first on lie one behind the other."""
    breaks = np.flatnonzero(np.diff(index) != 1)
    return int(breaks[0]) + 1 if len(breaks) else len(index)
