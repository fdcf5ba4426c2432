"""A stored tensor that counts as another dtype: an adapter's full tensor in place of the base's, for example."""

from __future__ import annotations

from merge.plan import Derived, TensorRef
from merge.sources import Fill, Read


def recast(ref: TensorRef, dtype: str) -> TensorRef:
    """The ref itself where it has the dtype already."""
    return ref if ref.dtype == dtype else Derived(ref.name, dtype, ref.shape, "recast", (ref,))


def prepare(ref: Derived, read: Read) -> Fill:
    (stored,) = ref.inputs
    return lambda start, out: read(stored, start, out)


def held_bytes(ref: Derived) -> int:
    return 0
