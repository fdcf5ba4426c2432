"""added: a tensor plus a multiple of another one of its size. inputs: the two. parameters: scaling, of the second."""

from __future__ import annotations

import numpy as np

from merge.plan import Derived, TensorRef
from merge.sources import F32, Fill, Read


def added(ref: TensorRef, change: TensorRef, scaling: float) -> TensorRef:
    """The ref of the sum, under the name, dtype and shape of `ref`."""
    return Derived(ref.name, ref.dtype, ref.shape, "added", (ref, change), {"scaling": scaling})


def prepare(ref: Derived, read: Read) -> Fill:
    (first, second), scaling = ref.inputs, float(ref.parameters["scaling"])

    def fill(start: int, out: F32) -> None:
        change = np.empty(len(out), np.float32)
        read(first, start, out)
        read(second, start, change)
        out[:] = out + scaling * change.astype(np.float64)

    return fill


def held_bytes(ref: Derived) -> int:
    return 0
