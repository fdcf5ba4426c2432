"""Fine-tune minus base of one matrix, in blocks of rows; kept in memory between passes if small enough."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from merge.checkpoint.reader import SourceReader
from merge.errors import NumbersError
from merge.tools.extract.select import Pair

_BLOCK = 1 << 20  # elements of a block: 8 MiB as float64
KEPT = 1 << 26  # elements: a matrix of at most 256 MiB in float32 is read once


class MatrixDifference:
    """D = fine-tune - base, (rows, columns).

    Raises, where it is first read: NumbersError for NaN and infinity.
    """

    def __init__(self, pair: Pair, reader: SourceReader) -> None:
        self.pair, self._reader = pair, reader
        self.rows = pair.base.shape[0] if len(pair.base.shape) > 1 else 1
        self.columns = pair.base.size // max(1, self.rows)
        self._per_block = max(1, _BLOCK // max(1, self.columns))
        self._kept: dict[int, Tensor] | None = {} if pair.base.size <= KEPT else None

    def blocks(self) -> Iterator[tuple[int, Tensor]]:
        """(first row, rows of D (n, columns) float64)"""
        for first in range(0, self.rows, self._per_block):
            kept = None if self._kept is None else self._kept.get(first)
            if kept is None:
                kept = self._read(first)
                if self._kept is not None:
                    self._kept[first] = kept
            yield first, kept.to(torch.float64)

    def times(self, right: Tensor) -> Tensor:
        """D · right (columns, k) -> (rows, k) float64"""
        out = torch.empty(self.rows, right.shape[1], dtype=torch.float64)
        for first, block in self.blocks():
            torch.matmul(block, right, out=out[first : first + len(block)])
        return out

    def transposed_times(self, left: Tensor) -> Tensor:
        """D^T · left (rows, k) -> (columns, k) float64"""
        out = torch.zeros(self.columns, left.shape[1], dtype=torch.float64)
        for first, block in self.blocks():
            out.addmm_(block.T, left[first : first + len(block)])
        return out

    def whole(self) -> Tensor:
        return torch.cat([block for _, block in self.blocks()])

    def squares(self) -> float:
        """‖D‖²"""
        return sum(float(torch.sum(block * block)) for _, block in self.blocks())

    def _read(self, first: int) -> Tensor:
        rows = min(self._per_block, self.rows - first)
        values = [np.empty(rows * self.columns, np.float32) for _ in range(2)]
        for ref, into in zip((self.pair.tuned, self.pair.base), values, strict=True):
            self._reader.read_values(ref, first * self.columns, into)
        tuned, base = values
        with np.errstate(all="ignore"):  # told below
            tuned -= base
        if not np.isfinite(tuned).all():
            raise NumbersError(
                f"{self.pair.name}: NaN, infinity or a difference beyond float32, in the fine-tune or its base. "
                "Leave the module out with --exclude, or repair the model."
            )
        return torch.from_numpy(tuned.reshape(rows, self.columns))


def base_squares(pair: Pair, reader: SourceReader) -> float:
    """‖base‖² of any tensor"""
    total = 0.0
    for start in range(0, pair.base.size, _BLOCK):
        values = np.empty(min(_BLOCK, pair.base.size - start), np.float32)
        reader.read_values(pair.base, start, values)
        total += float(np.sum(np.square(values, dtype=np.float64)))
    return total
