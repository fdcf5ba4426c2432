"""Elements of a stored view that is not contiguous (a transposed or sliced tensor in a torch pickle), by bounded reads.

The view's elements start..stop, in row-major order, are a few boxes. A box whose bytes lie close together is read at
once and picked from; any other is halved along the axis that spreads it most.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import numpy as np
import numpy.typing as npt

# fill(first, out): the contiguous elements from `first` on, counted from the view's element 0.
Fill = Callable[[int, npt.NDArray[np.generic]], None]
_DENSE_BYTES = 1 << 20  # read at once if at least half of them are wanted
_SPARSE_BYTES = 1 << 14  # read at once in any case: about the cost of a system call


def read_strided(
    shape: tuple[int, ...], strides: tuple[int, ...], start: int, out: npt.NDArray[np.generic], fill: Fill
) -> None:
    """Elements start.. of the flattened view -> out (n,); memory: 1 MiB.

    Args:
        shape, strides: of the view, in elements; strides are not negative.
        fill: reads stored elements.
    """
    place = 0
    for first, sizes in boxes(shape, start, start + len(out)):
        count = math.prod(sizes)
        origin = sum(index * step for index, step in zip(first, strides, strict=True))
        _read_box(origin, strides, out[place : place + count].reshape(sizes), fill)
        place += count


def boxes(shape: tuple[int, ...], start: int, stop: int) -> Iterator[tuple[tuple[int, ...], tuple[int, ...]]]:
    """(first index, sizes) of boxes that hold the elements start..stop of a row-major array, in order."""
    if start >= stop:
        return
    if len(shape) <= 1:
        yield ((start,), (stop - start,)) if shape else ((), ())
        return
    inner = math.prod(shape[1:])
    (row, begin), (last_row, end) = divmod(start, inner), divmod(stop, inner)
    if begin:  # the rest of a row that was begun before
        until = end if row == last_row else inner
        for first, sizes in boxes(shape[1:], begin, until):
            yield (row, *first), (1, *sizes)
        if row == last_row:
            return
        row += 1
    if row < last_row:
        yield (row, *(0 for _ in shape[1:])), (last_row - row, *shape[1:])
    for first, sizes in boxes(shape[1:], 0, end):
        yield (last_row, *first), (1, *sizes)


def _read_box(origin: int, strides: tuple[int, ...], out: npt.NDArray[np.generic], fill: Fill) -> None:
    spread = [(size - 1) * step for size, step in zip(out.shape, strides, strict=True)]
    span = 1 + sum(spread)
    span_bytes = span * out.itemsize
    if span == 1 or span_bytes <= _SPARSE_BYTES or (span_bytes <= _DENSE_BYTES and span <= 2 * out.size):
        buffer = np.empty(span, out.dtype)
        fill(origin, buffer)
        out[...] = np.lib.stride_tricks.as_strided(buffer, out.shape, tuple(step * out.itemsize for step in strides))
        return
    axis = spread.index(max(spread))
    half = out.shape[axis] // 2
    front, back = (slice(None),) * axis + (slice(half),), (slice(None),) * axis + (slice(half, None),)
    _read_box(origin, strides, out[front], fill)
    _read_box(origin + half * strides[axis], strides, out[back], fill)
