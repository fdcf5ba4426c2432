"""Elements of a tensor whose rows or columns are read in another order, by bounded reads."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

# read(start, out): the contiguous elements from `start` on, as they are stored.
Read = Callable[[int, npt.NDArray[np.generic]], None]


@dataclass(frozen=True, slots=True)
class Order:
    """Entry i along `axis` (0: rows, 1: columns of a matrix) is the stored entry index[i]."""

    axis: int
    index: npt.NDArray[np.int64]


def read_permuted(shape: tuple[int, ...], order: Order, start: int, out: npt.NDArray[np.generic], read: Read) -> None:
    """Elements start.. of the flattened, permuted tensor -> out (n,); memory: one row, for columns."""
    length = math.prod(shape[1:])
    row_buffer = np.empty(length, out.dtype) if order.axis else None
    place = 0
    while place < len(out):
        row, column = divmod(start + place, length)
        count = min(length - column, len(out) - place)
        piece = out[place : place + count]
        if row_buffer is not None:
            read(row * length, row_buffer)
            np.take(row_buffer, order.index[column : column + count], out=piece, mode="clip")  # "raise" would copy
        elif column or count < length:
            read(int(order.index[row]) * length + column, piece)
        else:
            run = _run(order.index[row : row + (len(out) - place) // length])
            piece, count = out[place : place + run * length], run * length
            read(int(order.index[row]) * length, piece)
        place += count


def _run(index: npt.NDArray[np.int64]) -> int:
    """How many entries from the first on lie one behind the other."""
    breaks = np.flatnonzero(np.diff(index) != 1)
    return int(breaks[0]) + 1 if len(breaks) else len(index)
