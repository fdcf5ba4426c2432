"""MiSS: W[i, j] + D[j mod r, i], a matrix that repeats itself along the inputs; and its variants bat and mini.

mini: D repeats itself along the outputs too. bat: W + W_b D + D for each r x r block W_b, D one for each r outputs.
Kang and Yin, arXiv:2409.15371.
"""

from __future__ import annotations

import numpy as np

from merge.adapter_kinds import AdaptedModule, Kind, Parts, Rows, Settings, Shape, expect, number
from merge.arrays import F64


def settings(module: AdaptedModule, matrix: Shape) -> Settings:
    shape, variant = module.shapes["miss_block"], module.config.get("init_weights", True)
    rank = shape[-1] if variant == "bat" else shape[0]
    mini = int(number(module.config, "mini_r", 1)) if variant == "mini" else matrix[0]
    expect(module, {"miss_block": (matrix[0] // rank, rank, rank) if variant == "bat" else (rank, mini)})
    if matrix[0] % (rank if variant == "bat" else mini) or (variant == "bat" and matrix[1] % rank):
        raise ValueError(f"miss_block: {list(shape)} does not divide a matrix of {list(matrix)}")
    return {"bat": variant == "bat"}


def rows(parts: Parts, settings: Settings, matrix: Shape) -> Rows:
    block = parts["miss_block"]
    return _bat(block) if settings["bat"] else _repeated(block, matrix[1])


def _repeated(block: F64, n_in: int) -> Rows:
    column = np.arange(n_in) % len(block)

    def change(first: int, values: F64) -> None:
        row = np.arange(first, first + len(values)) % block.shape[1]
        values += block[column[None, :], row[:, None]]

    return change


def _bat(blocks: F64) -> Rows:
    from merge.kernels.rotate import rotate

    rank = blocks.shape[1]

    def change(first: int, values: F64) -> None:
        for i, row in enumerate(values, first):
            block = blocks[i // rank]
            made = row.reshape(1, -1).copy()
            rotate(made, np.broadcast_to(block.T, (len(row) // rank, rank, rank)).copy())
            row += made[0] + np.tile(block[i % rank], len(row) // rank)

    return change


KIND = Kind(parts=("miss_block",), settings=settings, rows=rows)
