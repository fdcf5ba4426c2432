"""Blocks of a stage's tensor: its method's kernels over its sources, wherever these come from."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

import numpy as np

from merge.arrays import F32
from merge.chunks import Chunks
from merge.decode import to_float32
from merge.dtypes import DTYPES
from merge.errors import NumbersError
from merge.kernels.encode import count_nonfinite, encode
from merge.kernels.protocol import Block, Combine, sum_chunks
from merge.kernels.scratch import Scratch
from merge.methods import Method
from merge.plan import Derived
from merge.sources import Fill, Read

R = TypeVar("R")
S = TypeVar("S")


def filler(ref: Derived, method: Method, read: Read) -> Fill:
    """Lets the method look at the whole tensor, if it has to, and returns what computes any run of its elements."""
    tensor = _Tensor(ref, method, read)
    settings = method.keywords(dict(tensor.parameters["settings"]))
    if tensor.parameters["keys"]:
        settings["_keys"] = tensor.parameters["keys"]
    fused = method.load_fused()
    assert fused is not None, method.name  # the planner streams no other
    return _Filler(tensor, fused(tensor, **settings))


class _Tensor:
    """Implements merge.kernels.protocol.FusedTensor on the thread that asks; others work on other tensors meanwhile."""

    def __init__(self, ref: Derived, method: Method, read: Read) -> None:
        self.ref, self.method, self._read = ref, method, read
        self.inputs, self.parameters = ref.inputs, ref.parameters
        self.shape = ref.shape
        self.chunks = Chunks.of(ref.shape)
        self.size, self.n_chunks = self.chunks.size, self.chunks.count
        self.scratch = Scratch()

    def load(self, start: int, stop: int) -> Block:
        """Elements start .. stop of every source as float32, in this thread's buffer (valid until its next load)."""
        rows = self.scratch.array("raw", len(self.inputs) * (stop - start), np.float32).reshape(len(self.inputs), -1)
        for row, source in zip(rows, self.inputs, strict=True):
            self._read(source, start, row)
            if "nonfinite" not in self.parameters["allow"] and (count := int(count_nonfinite(row))):
                model = self.parameters["models"][self.inputs.index(source)]
                raise NumbersError(
                    f"{self.ref.name}, on the way to {self.parameters['stage']}: NaN or infinite values in the input: "
                    f'{count:,} in {model}. Set "allow: [nonfinite]" there to merge them.'
                )
        return Block(start, rows)

    def map_chunks(self, function: Callable[[Block], R], chunks: Sequence[int] | None = None) -> list[R]:
        chunks = range(self.n_chunks) if chunks is None else chunks
        return [function(self.load(*self.chunks.span(chunk))) for chunk in chunks]

    def fold_chunks(
        self, start: Callable[[], S], update: Callable[[S, Block], None], chunks: Sequence[int] | None = None
    ) -> list[S]:
        state = start()
        self.map_chunks(lambda block: update(state, block), chunks)
        return [state]

    sum_chunks = sum_chunks


class _Filler:
    """Computes any run of elements. Methods that look at rows get whole chunks, as the engine would give them."""

    def __init__(self, tensor: _Tensor, combine: Combine) -> None:
        self._tensor, self._combine = tensor, combine
        self._whole_chunks = tensor.method.locality != "element"

    def __call__(self, start: int, out: F32) -> None:
        tensor, stop = self._tensor, start + len(out)
        for chunk in range(start // tensor.chunks.length, -(-stop // tensor.chunks.length)):
            first, last = tensor.chunks.span(chunk)
            begin, end = max(start, first), min(stop, last)
            target = out[begin - start : end - start]
            if (begin, end) == (first, last) or not self._whole_chunks:
                self._compute(begin, target)
            else:
                values = tensor.scratch.array("values", last - first, np.float32)
                self._compute(first, values)
                target[:] = values[begin - first : end - first]

    def _compute(self, start: int, out: F32) -> None:
        """Combines, rounds to the stage's dtype, widens."""
        tensor, dtype = self._tensor, self._tensor.ref.dtype
        self._combine(tensor.load(start, start + len(out)), out)
        encoded = tensor.scratch.array("encoded", len(out), np.dtype(DTYPES[dtype].numpy_name))
        nonfinite, overflow, largest, _ = encode(out, dtype, encoded)
        allow, where = tensor.parameters["allow"], f"{tensor.ref.name}, on the way to {tensor.parameters['stage']}"
        if overflow and "overflow" not in allow:
            raise NumbersError(
                f"{where}: {overflow:,} values (largest {largest:.6g}) do not fit {dtype}. "
                'Choose another dtype there, or set "allow: [overflow]" to let them become infinite.'
            )
        if nonfinite and "nonfinite" not in allow:
            raise NumbersError(
                f"{where}: the merge gives {nonfinite:,} NaN or infinite values from finite inputs. "
                'Look at its weights, or set "allow: [nonfinite]" there.'
            )
        to_float32(dtype, encoded, out)
