"""Presents values that a method computes for each entry as task vectors, for merge.kernels.selection."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

import numpy as np

from merge.arrays import F32
from merge.kernels.protocol import Block, Passes
from merge.kernels.scratch import Scratch

R = TypeVar("R")
S = TypeVar("S")
_scratch = Scratch()


class Computed:
    """merge.kernels.protocol.Passes over blocks of two float32 rows: zeros, and what fill(block, out) makes of a block.

    The blocks are valid until the same thread's next one.
    """

    def __init__(self, tensor: Passes, fill: Callable[[Block, F32], None]) -> None:
        self._tensor, self._fill = tensor, fill
        self.size, self.n_chunks = tensor.size, tensor.n_chunks

    def map_chunks(self, function: Callable[[Block], R], chunks: Sequence[int] | None = None) -> list[R]:
        return self._tensor.map_chunks(lambda block: function(self._computed(block)), chunks)

    def fold_chunks(
        self, start: Callable[[], S], update: Callable[[S, Block], None], chunks: Sequence[int] | None = None
    ) -> list[S]:
        return self._tensor.fold_chunks(start, lambda state, block: update(state, self._computed(block)), chunks)

    def _computed(self, block: Block) -> Block:
        n = block.raw.shape[1]
        raw = _scratch.array("raw", 2 * n, np.float32).reshape(2, n)
        raw[0] = 0
        self._fill(block, raw[1])
        return Block(block.start, raw)
