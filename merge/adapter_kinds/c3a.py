"""C³A: W + K / in, K of square blocks that are circulant: entry (i, j) of a block is k[(j - i) mod b].

Chen et al., arXiv:2407.19342.
"""

from __future__ import annotations

import numpy as np

from merge.adapter_kinds import AdaptedModule, Kind, Parts, Rows, Settings, Shape
from merge.arrays import F64


def settings(module: AdaptedModule, matrix: Shape) -> Settings:
    shape = module.shapes["c3a_kernel"]
    if len(shape) != 3 or (shape[0] * shape[2], shape[1] * shape[2]) != matrix:
        raise ValueError(f"c3a_kernel: expected blocks of a matrix of {list(matrix)}, found {list(shape)}")
    return {}


def rows(parts: Parts, settings: Settings, matrix: Shape) -> Rows:
    kernel = parts["c3a_kernel"]
    width = kernel.shape[2]
    places = (np.arange(width) - np.arange(width)[:, None]) % width

    def change(first: int, values: F64) -> None:
        for i, row in enumerate(values, first):
            row += kernel[i // width][:, places[i % width]].reshape(-1) / matrix[1]

    return change


def held(settings: Settings, matrix: Shape) -> int:
    return 8 * min(matrix) ** 2


KIND = Kind(parts=("c3a_kernel",), settings=settings, rows=rows, held=held)
