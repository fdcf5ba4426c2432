"""Emitter: rounds float32 results, takes statistics and the digest, and writes, a block at a time."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt

from merge.chunks import Chunks, chunk_digest, tensor_digest
from merge.dtypes import DTYPES
from merge.engine.tensor import Buffers
from merge.kernels.encode import encode
from merge.kernels.rounding import N_SUMS, rounding_sums
from merge.output.sink import Sink
from merge.plan import Step


class Emitter:
    """Writes one step's tensor. Blocks may come in any order and from any thread; each is a run of whole chunks."""

    def __init__(self, step: Step, out: Sink, buffers: Buffers) -> None:
        self.step = step
        self._out, self._buffers = out, buffers
        self._chunks = Chunks.of(step.shape)
        n = self._chunks.count
        self._digests = [b""] * n
        self._squares = np.zeros(n)  # by chunk and summed in order, so that the statistics are reproducible too
        self._counts = np.zeros((n, 2), np.int64)  # non-finite, overflow
        self._largest = np.zeros(n)
        self._dtype = DTYPES[step.dtype]
        self._rounding = np.zeros((n, N_SUMS)) if out.plan.notes_rounding else None

    def put(self, start: int, values: npt.NDArray[Any]) -> None:
        """values (n,) float32 (float64 for an F64 tensor), elements start .. start + n of the tensor"""
        length = self._chunks.length
        encoded = self._buffers.encoded(len(values), np.dtype(self._dtype.numpy_name))
        for place in range(0, len(values), length):
            piece = slice(place, place + length)
            nonfinite, overflow, largest, squares = encode(values[piece], self._dtype.name, encoded[piece])
            chunk = (start + place) // length
            self._counts[chunk] = nonfinite, overflow
            self._largest[chunk], self._squares[chunk] = largest, squares
            if self._rounding is not None:
                self._rounding[chunk] = rounding_sums(values[piece], self._dtype.name, encoded[piece])
        self.put_stored(start, encoded)

    def put_stored(self, start: int, encoded: npt.NDArray[Any]) -> None:
        """Writes elements that already have the output dtype."""
        length = self._chunks.length
        for place in range(0, len(encoded), length):
            self._digests[(start + place) // length] = chunk_digest(encoded[place : place + length].data)
        self._out.write(self.step, start, encoded.data, self._dtype.itemsize)

    def record(self, sources: list[str], nonfinite_in: list[int]) -> dict[str, object]:
        """This tensor's entry for journal and manifest."""
        record: dict[str, Any] = {"digest": tensor_digest(self._digests), "sources": sources}
        if self.step.kind != "copy":
            if (squares := _exact_sum(self._squares)) is not None:
                record["rms"] = math.sqrt(squares / max(1, self.step.size))
            record["absmax"] = float(self._largest.max(initial=0.0))
            if self._rounding is not None:
                record["rounding"] = _rounding(self._rounding)
        nonfinite, overflow = (int(count) for count in self._counts.sum(axis=0))
        if any(nonfinite_in):
            record["nonfinite_in"] = nonfinite_in
        if nonfinite:
            record["nonfinite"] = nonfinite
        if overflow:
            record["overflow"] = overflow
        return record


def _rounding(sums: npt.NDArray[np.float64]) -> dict[str, object]:
    """sums (chunk, 5) -> the manifest's entry on rounding; see merge.kernels.rounding"""
    changed, underflow = (int(count) for count in sums[:, :2].sum(axis=0))
    lost, squares = (_exact_sum(sums[:, column]) or 0.0 for column in (3, 4))
    largest = float(sums[:, 2].max(initial=0.0))
    return {"changed": changed, "underflow": underflow, "largest": largest, "lost": lost, "squares": squares}


def _exact_sum(values: npt.NDArray[np.float64]) -> float | None:
    """The sum; None if it is not finite, which JSON cannot express: NaN among the values, or float64 overflows."""
    try:
        total = math.fsum(values)
    except OverflowError:
        return None
    return total if math.isfinite(total) else None
