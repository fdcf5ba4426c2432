"""part: consecutive elements of another tensor, in a shape of their own.

inputs: the tensor. parameters: `start`, its first element. A tensor that is stored plainly needs no operation.
"""

from __future__ import annotations

import dataclasses

from merge.derive import F32, Fill, Read
from merge.dtypes import DTYPES
from merge.plan import Derived, TensorRef


def part(ref: TensorRef, start: int, shape: tuple[int, ...]) -> TensorRef:
    """The elements from `start` on, of this shape; the tensor itself where that is all of it."""
    if start == 0 and shape == ref.shape:
        return ref
    if ref.is_exact and ref.strides is None and ref.units is None:
        return dataclasses.replace(ref, offset=ref.offset + start * DTYPES[ref.dtype].itemsize, shape=shape)
    dtype = "BF16" if ref.scale is not None else ref.dtype  # FP8 with scales is not FP8 any more once it is read
    return TensorRef("", ref.name, dtype, shape, 0, derived=Derived("part", (ref,), {"start": start}))


def view(ref: TensorRef, row: int, column: int, shape: tuple[int, int], step: int = 1) -> TensorRef:
    """Of a stored matrix the rows from `row` on and every step-th column from `column` on, in this shape."""
    assert ref.is_exact
    down, across = ref.strides or (ref.shape[1], 1)
    offset = ref.offset + (row * down + column * across) * DTYPES[ref.dtype].itemsize
    strides = (down, across * step)
    return dataclasses.replace(ref, offset=offset, shape=shape, strides=None if strides == (shape[1], 1) else strides)


def prepare(ref: TensorRef, read: Read) -> Fill:
    assert ref.derived is not None
    (whole,), first = ref.derived.inputs, int(ref.derived.parameters["start"])

    def fill(start: int, out: F32) -> None:
        read(whole, first + start, out)

    return fill


def held_bytes(ref: TensorRef) -> int:
    return 0
