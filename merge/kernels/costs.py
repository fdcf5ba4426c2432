"""Memory that kernels need beside their blocks: at most this many bytes on one thread.

Methods name theirs in their decorator; tests/test_costs.py holds each against what its kernel really takes.
"""

from __future__ import annotations

import math
from collections.abc import Callable

Shape = tuple[int, ...]
Scratch = Callable[[Shape, int, int], int]  # (shape of the tensor, number of inputs, elements of a block) -> bytes

_SELECTION = (1 << 23) + (1 << 19)  # histograms for one threshold; see selection.py
_ORDERED = 1 << 20  # rows of a matrix are put in order a few at a time; see ranks.py


def nothing(shape: Shape, n_inputs: int, elements: int) -> int:
    """Kernels that compute element by element, and those that only add up sums."""
    return 0


def drop_factors(shape: Shape, n_inputs: int, elements: int) -> int:
    """A float32 factor for every entry of a block."""
    return 4 * n_inputs * elements


def trimming(shape: Shape, n_inputs: int, elements: int) -> int:
    """Factors, and the search of a threshold for each input."""
    return drop_factors(shape, n_inputs, elements) + n_inputs * _SELECTION


def ranks(shape: Shape, n_inputs: int, elements: int) -> int:
    """Magnitudes of a row in order; a vector is one row, and put in order as a whole before."""
    if len(shape) < 2:
        return (40 + 12 * n_inputs) * max(math.prod(shape), elements)
    return drop_factors(shape, n_inputs, elements) + _ORDERED + 28 * shape[-1]


def one_value(shape: Shape, n_inputs: int, elements: int) -> int:
    """A float32 for every element of a block."""
    return 4 * elements


def searched_values(n_thresholds: int) -> Scratch:
    """Values that are computed in every pass over blocks, and thresholds among them; see computed.py."""

    def taken(shape: Shape, n_inputs: int, elements: int) -> int:
        width = shape[-1] if shape else 1
        rows = math.prod(shape) // max(1, width)
        # A number for each row; a vector, which is one row, is held whole.
        return 12 * elements + n_thresholds * _SELECTION + (8 * rows if rows > 1 else 16 * width)

    return taken
