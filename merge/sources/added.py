"""added: a tensor plus a multiple of another one of its size. inputs: the two. parameters: scaling, of the second."""

from __future__ import annotations

import numpy as np

from merge.arrays import F32
from merge.plan import Derived, TensorRef
from merge.sources import Fill, Read

_ELEMENTS = 1 << 13  # that are added at once


def added(ref: TensorRef, change: TensorRef, scaling: float) -> TensorRef:
    """The ref of the sum, under the name, dtype and shape of `ref`."""
    return Derived(ref.name, ref.dtype, ref.shape, "added", (ref, change), {"scaling": scaling})


def prepare(ref: Derived, read: Read) -> Fill:
    (first, second), scaling, block = ref.inputs, float(ref.parameters["scaling"]), _block(ref)

    def fill(start: int, out: F32) -> None:
        read(first, start, out)
        change = np.empty(min(len(out), block), np.float32)
        for place in range(0, len(out), block):
            part = out[place : place + block]
            read(second, start + place, change[: len(part)])
            part[:] = part + scaling * change[: len(part)].astype(np.float64)

    return fill


def held_bytes(ref: Derived) -> int:
    """The change as float32; it, its product and the sum as float64."""
    return (4 + 3 * 8) * _block(ref)


def _block(ref: TensorRef) -> int:
    """Whole rows: a change that is a product of factors would compute a cut row twice."""
    width = ref.shape[-1] if len(ref.shape) > 1 else 1
    return max(1, _ELEMENTS // max(1, width)) * max(1, width)
