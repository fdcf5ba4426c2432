"""rows: a matrix over a vocabulary, put together row by row from the rows of other matrices.

Each output row is one input row, the mean of several, zeros, or the mean of all rows that are none of the last kind
(which is how a vocabulary is best padded: Hewitt 2021, "Initializing New Word Embeddings for Pretrained Language
Models"). Only the map is held; what one block needs is read when it is needed, and rows that follow each other are read
at once.
"""

from __future__ import annotations

import base64
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from merge.arrays import F32, I32
from merge.plan import Derived, TensorRef
from merge.sources import Fill, Read

MEAN = -1  # in RowMap.counts: the mean of all other rows
_BLOCK = 1 << 17  # elements read at once for the mean


@dataclass(frozen=True)
class RowMap:
    """Where every row comes from.

    Attributes:
        counts: (rows,) how many input rows an output row is the mean of; 0: zeros; MEAN: see above.
        inputs, rows: (sum of the positive counts,) the input and its row, output row after output row.
    """

    counts: I32
    inputs: I32
    rows: I32

    @staticmethod
    def of(own: I32, others: Mapping[int, Sequence[tuple[int, int]] | None]) -> RowMap:
        """Rows of input 0, and what is none.

        Args:
            own: (rows,) the row of input 0; not looked at where `others` has an entry.
            others: output row -> the (input, row) pairs it is the mean of; None for the mean of all rows.
        """
        counts = np.ones(len(own), np.int32)
        for number, pairs in others.items():
            counts[number] = MEAN if pairs is None else len(pairs)
        positive = np.maximum(counts, 0)
        offsets = np.cumsum(positive, dtype=np.int64) - positive
        inputs, rows = np.zeros(int(positive.sum()), np.int32), np.zeros(int(positive.sum()), np.int32)
        plain = np.ones(len(own), bool)
        plain[list(others)] = False
        rows[offsets[plain]] = own[plain]
        for number, pairs in others.items():
            for place, (source, row) in enumerate(pairs or (), int(offsets[number])):
                inputs[place], rows[place] = source, row
        return RowMap(counts, inputs, rows)

    @property
    def n_rows(self) -> int:
        return len(self.counts)

    def is_identity(self, n_rows: int) -> bool:
        """Whether the result is input 0, of n_rows, as it is."""
        return (
            self.n_rows == n_rows
            and bool((self.counts == 1).all())
            and not self.inputs.any()
            and bool((self.rows == np.arange(n_rows, dtype=np.int32)).all())
        )

    def packed(self) -> dict[str, str]:
        """As parameters of a Derived: differences, since neighbours mostly stay neighbours, compressed, as text."""
        return {name: _pack(getattr(self, name)) for name in ("counts", "inputs", "rows")}

    @staticmethod
    def unpacked(parameters: dict[str, Any]) -> RowMap:
        return RowMap(*(_unpack(parameters[name]) for name in ("counts", "inputs", "rows")))


def rows_ref(name: str, sources: tuple[TensorRef, ...], row_map: RowMap, shape: tuple[int, ...]) -> TensorRef:
    """A tensor of this shape whose rows are those of `sources`, all of the same width.

    The dtype that an output gets which keeps its input's is that of the first source.
    """
    parameters = {"n_rows": row_map.n_rows, **row_map.packed()}
    return Derived(name, sources[0].dtype, shape, "rows", sources, parameters)


def _pack(values: I32) -> str:
    steps = np.diff(values, prepend=np.int32(0)).astype("<i4")
    return base64.b64encode(zlib.compress(steps.tobytes(), 6)).decode("ascii")


def _unpack(text: str) -> I32:
    steps = np.frombuffer(zlib.decompress(base64.b64decode(text)), "<i4")
    return np.cumsum(steps, dtype=np.int32)


def prepare(ref: Derived, read: Read) -> Fill:
    rows = _Rows(ref, RowMap.unpacked(ref.parameters), read)
    return rows.fill


def held_bytes(ref: Derived) -> int:
    n_rows = int(ref.parameters["n_rows"])
    width = ref.size // max(1, n_rows)
    # counts, offsets, inputs and rows; the mean and what one read takes
    return 4 * n_rows * 5 + 8 * (4 * width + 2 * _BLOCK)


class _Rows:
    def __init__(self, ref: Derived, row_map: RowMap, read: Read) -> None:
        self._sources, self._read = ref.inputs, read
        self._counts = row_map.counts
        positive = np.maximum(row_map.counts, 0)
        self._offsets = np.cumsum(positive, dtype=np.int64) - positive
        self._inputs, self._rows = row_map.inputs, row_map.rows
        self._width = ref.size // max(1, row_map.n_rows)
        self._mean: F32 | None = None
        if bool((row_map.counts == MEAN).any()):
            self._mean = self._mean_row()

    def fill(self, start: int, out: F32) -> None:
        """Whole rows go straight to `out`; of a row that is cut, the part."""
        width = self._width
        first, last = start // width, -(-(start + len(out)) // width)
        if start % width or len(out) % width:
            whole = np.empty((last - first) * width, np.float32)
            self._fill_rows(first, last, whole)
            out[:] = whole[start - first * width :][: len(out)]
        else:
            self._fill_rows(first, last, out)

    def _fill_rows(self, first: int, last: int, out: F32) -> None:
        """Output rows first .. last -> out, run by run of rows that lie next to each other in one source."""
        counts = self._counts[first:last]
        single = counts == 1
        place = np.minimum(self._offsets[first:last], max(0, len(self._inputs) - 1))
        source = np.where(single, self._inputs[place], -1) if len(self._inputs) else np.full(last - first, -1)
        row = self._rows[place] if len(self._rows) else np.zeros(last - first, np.int32)
        begins = np.ones(last - first, bool)
        begins[1:] = ~single[1:] | (source[1:] != source[:-1]) | (row[1:] != row[:-1] + 1)
        starts = np.flatnonzero(begins)
        for begin, end in zip(starts.tolist(), [*starts[1:].tolist(), last - first], strict=True):
            part = out[begin * self._width : end * self._width]
            if single[begin]:
                self._read(self._sources[source[begin]], int(row[begin]) * self._width, part)
            else:
                self._fill_mixed(first + begin, part)

    def _fill_mixed(self, row: int, out: F32) -> None:
        """A row that no input has: zeros, the mean of all, or the mean of some, summed in float64."""
        count = int(self._counts[row])
        if count == MEAN:
            assert self._mean is not None
            out[:] = self._mean
        elif count == 0:
            out[:] = 0
        else:
            total, one = np.zeros(self._width, np.float64), np.empty(self._width, np.float32)
            for place in range(int(self._offsets[row]), int(self._offsets[row]) + count):
                self._read(self._sources[self._inputs[place]], int(self._rows[place]) * self._width, one)
                total += one
            out[:] = total / count

    def _mean_row(self) -> F32:
        """(width,) the mean of the rows that are not padding, in one pass, in their order."""
        real = self._counts != MEAN
        total = np.zeros(self._width, np.float64)
        step = max(1, _BLOCK // self._width)
        for first in range(0, len(real), step):
            last = min(first + step, len(real))
            if not real[first:last].any():
                continue
            self._mean = np.zeros(self._width, np.float32)  # stands for itself, and is left out of the sum
            block = np.empty((last - first) * self._width, np.float32)
            self._fill_rows(first, last, block)
            total += block.reshape(last - first, self._width)[real[first:last]].sum(axis=0, dtype=np.float64)
        mean: F32 = (total / max(1, int(real.sum()))).astype(np.float32)
        return mean
