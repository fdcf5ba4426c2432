"""StepTensor: reads one step's sources a block at a time, for fused methods and executors."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from merge.checkpoint.reader import SourceReader
from merge.chunks import Chunks, chunk_digest, tensor_digest
from merge.decode import to_float32
from merge.dtypes import DTYPES
from merge.engine.crew import Worker
from merge.kernels.encode import count_nonfinite
from merge.kernels.protocol import Block, sum_chunks
from merge.kernels.scratch import Scratch
from merge.plan import Step, TensorRef

AHEAD = 16  # chunks asked for at once
R = TypeVar("R")
S = TypeVar("S")
# What kernels read as it is stored; float64 goes to the torch definition.
_DIRECT: dict[str, np.dtype[Any]] = {
    "BF16": np.dtype(np.uint16),
    "F32": np.dtype(np.float32),
    "F64": np.dtype(np.float64),
}


class StepTensor:
    """Implements merge.kernels.protocol.FusedTensor over source files.

    The first time a block is read, its digest is taken and its non-finite values are counted.
    """

    def __init__(self, step: Step, reader: SourceReader, crew: Worker, buffers: Buffers, cache_bytes: int = 0) -> None:
        self.step = step
        self.sources: tuple[TensorRef, ...] = step.sources
        self.shape: tuple[int, ...] = step.shape
        self.chunks = Chunks.of(step.shape)
        self.size, self.n_chunks = self.chunks.size, self.chunks.count
        self._reader, self._crew, self._buffers = reader, crew, buffers
        self.raw_dtype = _common_dtype(self.sources)
        self._digests: list[list[bytes]] = [[b""] * self.n_chunks for _ in self.sources]
        self._nonfinite = np.zeros((len(self.sources), max(1, self.n_chunks)), np.int64)
        self._kept: npt.NDArray[Any] | None = None  # all chunks, where they fit; else every pass reads them again
        self._is_kept = [False] * self.n_chunks
        if self.size * len(self.sources) * self.raw_dtype.itemsize <= cache_bytes:
            self._kept = buffers.kept(self.size * len(self.sources), self.raw_dtype)

    def load(self, first: int, n: int = 1) -> Block:
        """Chunks first .. first + n of every source, in this thread's buffer (valid until the thread's next load)."""
        start, stop = self.chunks.span(first, n)
        n_sources = len(self.sources)
        if self._kept is None or n > 1:
            raw = self._buffers.raw(n_sources, stop - start, self.raw_dtype)
        else:
            raw = self._kept[start * n_sources : stop * n_sources].reshape(n_sources, stop - start)
            if self._is_kept[first]:
                return Block(start, raw)
            self._is_kept[first] = True
        if first % AHEAD == 0:
            self.read_ahead(first + n)
        for row, source in enumerate(self.sources):
            self._load_source(row, source, start, raw[row], first)
        return Block(start, raw)

    def read_ahead(self, first: int) -> None:
        """Asks the system to read the chunks from `first` ahead, while the processor is busy.

        Of a tensor of one chunk what lies behind it in its file: that is most likely the next one.
        """
        if self.n_chunks == 1:
            for source in self.sources:
                self._reader.will_need_next(source)
            return
        start, stop = self.chunks.span(first, AHEAD)
        for source in self.sources:
            self._reader.will_need(source, start, stop - start)

    def _load_source(self, row: int, source: TensorRef, start: int, into: npt.NDArray[Any], first: int) -> None:
        direct = _DIRECT.get(source.dtype) == self.raw_dtype
        if not source.is_exact:
            stored = into if into.dtype == np.float32 else self._buffers.stored(len(into), np.dtype(np.float32))
            self._reader.read_values(source, start, stored)
            into[:] = stored
        else:
            stored = into if direct else self._buffers.stored(len(into), np.dtype(DTYPES[source.dtype].numpy_name))
            self._reader.read_into(source, start, stored)
            if not direct:
                _widen(source.dtype, stored, into)
        for chunk in range(first, first + -(-len(into) // self.chunks.length)):
            if not self._digests[row][chunk]:
                piece = slice((chunk - first) * self.chunks.length, (chunk - first + 1) * self.chunks.length)
                self._nonfinite[row, chunk] = _count_nonfinite(into[piece])
                self._digests[row][chunk] = chunk_digest(stored[piece].data)

    def source_digests(self) -> list[str]:
        """The digest of each source. Every chunk must have been read."""
        return [tensor_digest(digests) for digests in self._digests]

    def nonfinite(self) -> list[int]:
        """Number of NaN and infinite values in each source."""
        return [int(count) for count in self._nonfinite.sum(axis=1)]

    def blocks(self, per_block: int) -> Iterator[tuple[int, int]]:
        """(first chunk, number of chunks) of each block."""
        for first in range(0, self.n_chunks, per_block):
            yield first, min(per_block, self.n_chunks - first)

    # What fused methods see.

    def map_chunks(self, function: Callable[[Block], R], chunks: Sequence[int] | None = None) -> list[R]:
        chunks = range(self.n_chunks) if chunks is None else chunks
        results: list[R | None] = [None] * len(chunks)

        def update(state: None, item: tuple[int, int]) -> None:
            place, chunk = item
            results[place] = function(self.load(chunk))

        self._crew.fold(lambda: None, update, enumerate(chunks))
        return results  # type: ignore[return-value]

    def fold_chunks(
        self, start: Callable[[], S], update: Callable[[S, Block], None], chunks: Sequence[int] | None = None
    ) -> list[S]:
        chunks = range(self.n_chunks) if chunks is None else chunks
        return self._crew.fold(start, lambda state, chunk: update(state, self.load(chunk)), chunks)

    sum_chunks = sum_chunks


def _common_dtype(sources: Sequence[TensorRef]) -> np.dtype[Any]:
    """The type that sources are held in: their own if kernels read it, else float32 (float64 if any source is)."""
    dtypes = [source.dtype for source in sources if source.is_exact]
    if "F64" in dtypes:
        return _DIRECT["F64"]
    if len(set(dtypes)) == 1 and dtypes[0] in _DIRECT and len(dtypes) == len(sources):
        return _DIRECT[dtypes[0]]
    return np.dtype(np.float32)


def _widen(dtype: str, stored: npt.NDArray[Any], into: npt.NDArray[Any]) -> None:
    """Stored elements -> float32 or float64."""
    if dtype == "F64":
        into[:] = stored
    elif into.dtype == np.float64:
        narrow = np.empty(len(into), np.float32)
        to_float32(dtype, stored, narrow)
        into[:] = narrow
    else:
        to_float32(dtype, stored, into)


def _count_nonfinite(values: npt.NDArray[Any]) -> int:
    if values.dtype == np.float64:
        return int(values.size - np.isfinite(values).sum())
    return int(count_nonfinite(values))


class Buffers:
    """Memory that each thread reuses from block to block; fresh pages would cost as much as the arithmetic."""

    def __init__(self) -> None:
        self._scratch = Scratch()

    def raw(self, n_sources: int, length: int, dtype: np.dtype[Any]) -> npt.NDArray[Any]:
        """(n_sources, length), rows contiguous"""
        flat = self._scratch.array("raw", n_sources * length * dtype.itemsize, np.uint8).view(dtype)
        return flat.reshape(n_sources, length)

    def kept(self, length: int, dtype: np.dtype[Any]) -> npt.NDArray[Any]:
        """A buffer for one step's whole sources; the thread that owns the step shares it with its helpers."""
        return self._scratch.array("kept", length * dtype.itemsize, np.uint8).view(dtype)

    def stored(self, length: int, dtype: np.dtype[Any]) -> npt.NDArray[Any]:
        return self._scratch.array("stored", length * dtype.itemsize, np.uint8).view(dtype)

    def values(self, length: int) -> npt.NDArray[np.float32]:
        return self._scratch.array("values", length * 4, np.uint8).view(np.float32)

    def encoded(self, length: int, dtype: np.dtype[Any]) -> npt.NDArray[Any]:
        return self._scratch.array("encoded", length * dtype.itemsize, np.uint8).view(dtype)

    def give_back(self) -> None:
        """Frees what the calling thread holds."""
        self._scratch.__dict__.clear()
