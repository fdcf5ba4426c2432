"""view: a stored tensor whose elements do not lie one after another (transposed or sliced in a torch pickle).

inputs: the stored elements from the view's first to its last, as a vector. parameters: `strides`, in elements.

The view's elements start..stop, in row-major order, are a few boxes. A box whose bytes lie close together is read at
once and picked from; any other is halved along the axis that spreads it most.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import numpy.typing as npt

from merge.dtypes import DTYPES
from merge.plan import Derived, Stored, TensorRef
from merge.sources import Fill, Read

# contiguous(first, out): the stored elements from `first` on, counted from the view's element 0.
Contiguous = Callable[[int, npt.NDArray[Any]], None]
_DENSE_BYTES = 1 << 20  # read at once if at least half of them are wanted
_SPARSE_BYTES = 1 << 14  # read at once in any case: about the cost of a system call


def strided(first: Stored, strides: tuple[int, ...]) -> TensorRef:
    """A tensor of these strides, in elements, whose element 0 is that of `first`, which has its shape."""
    if _is_contiguous(first.shape, strides):
        return first
    extent = 1 + sum((n - 1) * step for n, step in zip(first.shape, strides, strict=True))
    parameters = {"strides": strides}
    flat = dataclasses.replace(first, shape=(extent,))
    return Derived(first.name, first.dtype, first.shape, "view", (flat,), parameters, how="rearranged")


def _is_contiguous(shape: tuple[int, ...], strides: tuple[int, ...]) -> bool:
    expected = 1
    for size, step in zip(reversed(shape), reversed(strides), strict=True):
        if size > 1 and step != expected:
            return 0 in shape
        expected *= size
    return True


def submatrix(ref: TensorRef, row: int, column: int, shape: tuple[int, int], step: int = 1) -> TensorRef:
    """Of a stored matrix the rows from `row` on and every step-th column from `column` on, in this shape."""
    flat, (down, across) = ref, (ref.shape[1], 1)
    if isinstance(ref, Derived):
        (flat,), (down, across) = ref.inputs, ref.parameters["strides"]
    assert isinstance(flat, Stored)
    offset = flat.offset + (row * down + column * across) * DTYPES[ref.dtype].itemsize
    return strided(Stored(ref.name, ref.dtype, shape, flat.file, offset), (down, across * step))


def prepare(ref: Derived, read: Read) -> Fill:
    (flat,), strides = ref.inputs, ref.parameters["strides"]

    def contiguous(first: int, part: npt.NDArray[Any]) -> None:
        read(flat, first, part)

    return lambda start, out: read_strided(ref.shape, strides, start, out, contiguous)


def held_bytes(ref: Derived) -> int:
    return _DENSE_BYTES


def read_strided(
    shape: tuple[int, ...], strides: tuple[int, ...], start: int, out: npt.NDArray[Any], fill: Contiguous
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


def _read_box(origin: int, strides: tuple[int, ...], out: npt.NDArray[Any], fill: Contiguous) -> None:
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
