"""joined: tensors one after another along their first axis. inputs: the tensors, alike but for that axis."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from itertools import accumulate

from merge.arrays import F32
from merge.plan import Derived, TensorRef
from merge.sources import Fill, Read


def joined(name: str, refs: Sequence[TensorRef], shape: tuple[int, ...]) -> TensorRef:
    """A tensor of this shape; the only one itself where there is one."""
    if len(refs) == 1 and refs[0].shape == shape:
        return refs[0]
    return Derived(name, refs[0].dtype, shape, "joined", tuple(refs))


def prepare(ref: Derived, read: Read) -> Fill:
    inputs = ref.inputs
    starts = [0, *accumulate(each.size for each in inputs)]

    def fill(start: int, out: F32) -> None:
        done = 0
        while done < len(out):
            place = bisect_right(starts, start + done) - 1
            stop = min(len(out), starts[place + 1] - start)
            read(inputs[place], start + done - starts[place], out[done:stop])
            done = stop

    return fill


def held_bytes(ref: Derived) -> int:
    return 0
