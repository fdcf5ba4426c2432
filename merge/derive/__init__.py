"""Tensors that are computed while they are read: an adapter folded into its matrix, rows in another order, and so on.

A TensorRef with `derived` names an operation and its inputs. Whatever reads sources reads the result as if it were
stored, a block at a time, as float32; nothing is written in between. One file an operation, named in OPERATIONS.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Protocol, cast

import numpy as np
import numpy.typing as npt

from merge.plan import TensorRef

F32 = npt.NDArray[np.float32]
# fill(start, out): elements start .. start + n of the flattened result -> out (n,); called from any thread.
Fill = Callable[[int, F32], None]
# read(ref, start, out): the same of any tensor, stored or derived.
Read = Callable[[TensorRef, int, F32], None]

# operation -> the module that has it
OPERATIONS: dict[str, str] = {
    "lora": "merge.derive.lora",
    "low_rank": "merge.derive.low_rank",
    "added": "merge.derive.added",
    "adapted": "merge.derive.adapted",
    "residual": "merge.derive.residual",
    "part": "merge.derive.part",
    "joined": "merge.derive.joined",
    "layer_parts": "merge.derive.layer_parts",
    "recast": "merge.derive.recast",
    "token_rows": "merge.derive.token_rows",
    "stage": "merge.derive.stage",
    "rows": "merge.derive.rows",
    "zeros": "merge.derive.zeros",
    "random": "merge.derive.random",
    "noisy": "merge.derive.noisy",
    "reinitialised": "merge.derive.reinitialised",
    "prompt_rows": "merge.derive.prompt_rows",
}
# A tensor whose numbers the run finds before its steps, and hands to the reader under its parameter `key`.
FOUND = "found"


class Operation(Protocol):
    """What the module of an operation has. `ref.derived` is never None here."""

    def prepare(self, ref: TensorRef, read: Read) -> Fill:
        """Reads what is needed whole (an adapter's factors, a norm); called once a step and thread-safe."""

    def held_bytes(self, ref: TensorRef) -> int:
        """Bytes that `prepare` keeps, plus what one call of its Fill takes, for the memory prediction."""


def operation(ref: TensorRef) -> Operation:
    assert ref.derived is not None
    return cast(Operation, importlib.import_module(OPERATIONS[ref.derived.operation]))


def held_bytes(ref: TensorRef) -> int:
    """Bytes that reading a tensor takes besides its blocks, with all that it is derived from."""
    if ref.derived is None or ref.derived.operation == FOUND:
        return 0
    return operation(ref).held_bytes(ref) + sum(held_bytes(each) for each in ref.derived.inputs)
