"""The interface between the engine and fused methods: blocks, passes, results.

    def ties(tensor: FusedTensor, *, weight, density, ...) -> Combine

The method may look at the whole tensor in passes before it returns `combine`, which the engine calls once a block.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar

import numpy as np

from merge.arrays import F32, F64, Raw

R = TypeVar("R")
S = TypeVar("S")


@dataclass(frozen=True, slots=True)
class Block:
    """A run of elements of every source of one step.

    Attributes:
        start: flat index of the first element.
        raw: (source, n) bfloat16 as uint16, or float32; the base is row 0 where the method has one.
    """

    start: int
    raw: Raw


Combine = Callable[[Block, F32], None]


class Passes(Protocol):
    """Passes over a step's sources, a block at a time, on any free threads."""

    @property
    def size(self) -> int:
        """Number of elements."""

    @property
    def n_chunks(self) -> int:
        """Number of chunks; a chunk is the unit of sums, so that no result depends on the size of blocks."""

    def map_chunks(self, function: Callable[[Block], R], chunks: Sequence[int] | None = None) -> list[R]:
        """function of every chunk (or of those named), in the chunks' order."""

    def fold_chunks(
        self, start: Callable[[], S], update: Callable[[S, Block], None], chunks: Sequence[int] | None = None
    ) -> list[S]:
        """One state for each worker that took part, in no fixed order: for exact sums (integers, minima, maxima)."""


class FusedTensor(Passes, Protocol):
    """The sources of one step."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the output tensor; blocks are whole rows (last dimension) of tensors that are not vectors."""

    def sum_chunks(self, function: Callable[[Raw, F64], None], n: int) -> list[float]:
        """function(raw, out) writes n partial sums of a chunk; returns their exact totals (float64), in fixed order."""


def sum_chunks(tensor: Passes, function: Callable[[Raw, F64], None], n: int) -> list[float]:
    """FusedTensor.sum_chunks by its passes."""

    def sums(block: Block) -> F64:
        out = np.empty(n, np.float64)
        function(block.raw, out)
        return out

    return [math.fsum(column) for column in zip(*tensor.map_chunks(sums), strict=True)] or [0.0] * n
