"""Tensors computed while they are read: folded adapters, reordered rows, decoded formats.

A Derived names an operation and its inputs. Whatever reads sources reads the result as if it were stored, a block at a
time; nothing is written in between. Each operation has a file of its name.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable
from statistics import NormalDist
from typing import Any, Literal, Protocol, cast

import numpy as np
import numpy.typing as npt

from merge.arrays import F32
from merge.dtypes import DTYPES
from merge.plan import Derived, TensorRef

# fill(start, out): elements start .. start + n of the flattened result -> out (n,); called from any thread. float32, or
# of the tensor's dtype where the operation rearranges.
Fill = Callable[[int, F32], None]
# read(ref, start, out): the same of any tensor, stored or derived; in its own dtype for operations that rearrange, and
# integers (packed bits) into an `out` of their dtype.
Read = Callable[[TensorRef, int, npt.NDArray[Any]], None]

FOUND = "found"


def found(key: str, start: int, dtype: str, shape: tuple[int, ...], name: str = "") -> Derived:
    """Numbers that the run finds before its steps, and hands to the reader under this key; from the start-th on.

    Integers keep their dtype; floats are float32, and the dtype is that of the output.
    """
    how: Literal["rearranged", "computed"] = "computed" if DTYPES[dtype].is_float else "rearranged"
    return Derived(name or key, dtype, shape, FOUND, (), {"key": key, "start": start}, how)


class Operation(Protocol):
    """The functions of an operation's module."""

    def prepare(self, ref: Derived, read: Read) -> Fill:
        """Reads what is needed whole (an adapter's factors, a norm); called once a step and thread-safe."""

    def held_bytes(self, ref: Derived) -> int:
        """Bytes that `prepare` keeps, plus what one call of its Fill takes, for the memory prediction."""


def operation(ref: Derived) -> Operation:
    return cast(Operation, importlib.import_module(f"{__name__}.{ref.operation}"))


def held_bytes(ref: TensorRef) -> int:
    """Bytes that reading a tensor takes besides its blocks, including all tensors it is derived from."""
    if not isinstance(ref, Derived) or ref.operation == FOUND:
        return 0
    return operation(ref).held_bytes(ref) + sum(held_bytes(each) for each in ref.inputs)


def matrix(ref: TensorRef, read: Read) -> F32:
    """All of a tensor, in its shape."""
    values = np.empty(ref.size, np.float32)
    read(ref, 0, values)
    return values.reshape(ref.shape)


def any_range(rows: Fill, columns: int) -> Fill:
    """A fill of whole rows -> one of any elements: what is needed of rows that are cut is computed apart."""

    def fill(start: int, out: F32) -> None:
        stop = start + len(out)
        if start % columns == 0 and stop % columns == 0:
            rows(start, out)
            return
        first, last = start - start % columns, stop + -stop % columns
        whole = np.empty(last - first, np.float32)
        rows(first, whole)
        out[:] = whole[start - first : stop - first]

    return fill


def rounding(ref: TensorRef) -> float:
    """About what a quantised format's rounding changes: RMS of the change over that of the weights; 0 for others.

    An operation says it in `rounding(ref)`, for weights that are normal numbers.
    """
    if not isinstance(ref, Derived) or ref.operation == FOUND:
        return 0.0
    own = getattr(operation(ref), "rounding", None)
    return own(ref) if own is not None else max((rounding(each) for each in ref.inputs), default=0.0)


def rounding_to_steps(bits: int, group: int) -> float:
    """Of equal steps, over the range of `group` normal numbers: their largest magnitude has this median."""
    largest = NormalDist().inv_cdf((1 + 0.5 ** (1 / max(group, 1))) / 2)
    return 2 * largest / ((1 << bits) - 1) / math.sqrt(12)
