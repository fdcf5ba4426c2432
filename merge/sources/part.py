"""part: consecutive elements of another tensor, in a shape of their own.

inputs: the tensor. parameters: `start`, its first element. A tensor that is stored plainly needs no operation.
"""

from __future__ import annotations

import dataclasses

from merge.arrays import F32
from merge.dtypes import DTYPES
from merge.plan import Derived, Stored, TensorRef
from merge.sources import Fill, Read


def part(ref: TensorRef, start: int, shape: tuple[int, ...]) -> TensorRef:
    """The elements from `start` on, of this shape; the tensor itself where that is all of it."""
    if start == 0 and shape == ref.shape:
        return ref
    if isinstance(ref, Stored):
        return dataclasses.replace(ref, offset=ref.offset + start * DTYPES[ref.dtype].itemsize, shape=shape)
    return Derived(ref.name, ref.dtype, shape, "part", (ref,), {"start": start})


def prepare(ref: Derived, read: Read) -> Fill:
    (whole,), first = ref.inputs, int(ref.parameters["start"])

    def fill(start: int, out: F32) -> None:
        read(whole, first + start, out)

    return fill


def held_bytes(ref: Derived) -> int:
    return 0
