"""OFT: W R^T, R of orthogonal blocks along the inputs. Qiu et al., arXiv:2306.07280.

A block is the Cayley transform (I + Q)^-1 (I - Q) of a skew matrix Q, or that series' first terms, as the config says
(Qiu et al., arXiv:2506.19847); coft holds each Q to a length first.
"""

from __future__ import annotations

import math

import numpy as np

from merge.adapter_kinds import AdaptedModule, Kind, Parts, Rows, Settings, Shape, number
from merge.arrays import F64


def settings(module: AdaptedModule, matrix: Shape) -> Settings:
    shape = module.shapes["oft_R"]
    size = (1 + math.isqrt(1 + 8 * shape[-1])) // 2
    n_blocks = matrix[1] // size
    is_shared = bool(module.config.get("block_share"))
    if shape != (1 if is_shared else n_blocks, size * (size - 1) // 2) or n_blocks * size != matrix[1]:
        raise ValueError(
            f"oft_R: expected the upper triangles of blocks along {matrix[1]} inputs, found {list(shape)} (adapters of "
            "peft before 0.15 have another layout)"
        )
    terms = int(number(module.config, "num_cayley_neumann_terms", 5))
    return {
        "size": size,
        "terms": terms if module.config.get("use_cayley_neumann", True) else 0,
        "longest": number(module.config, "eps", 6e-5) if module.config.get("coft") else None,
    }


def rows(parts: Parts, settings: Settings, matrix: Shape) -> Rows:
    from merge.kernels.rotate import rotate

    skew = _skew(parts["oft_R"], settings["size"])
    if settings["longest"] is not None:
        most = settings["longest"] / math.sqrt(len(skew))
        lengths = np.sqrt((skew * skew).sum((1, 2), keepdims=True))
        skew = np.where(lengths <= most, skew, most * skew / np.where(lengths == 0, 1, lengths))
    blocks = _series(skew, settings["terms"]) if settings["terms"] else cayley(skew)
    turned = np.ascontiguousarray(np.broadcast_to(blocks, (matrix[1] // settings["size"], *blocks.shape[1:])))

    def change(first: int, values: F64) -> None:
        rotate(values, turned)

    return change


def _skew(triangles: F64, size: int) -> F64:
    """(blocks, size (size - 1) / 2) upper triangles, row by row -> (blocks, size, size)"""
    skew = np.zeros((len(triangles), size, size))
    row, column = np.triu_indices(size, 1)
    skew[:, row, column] = triangles
    return skew - skew.transpose(0, 2, 1)


def cayley(skew: F64) -> F64:
    """(I - Q) (I + Q)^-1 of each block"""
    eye = np.eye(skew.shape[1])
    solved = np.linalg.solve((eye + skew).transpose(0, 2, 1), (eye - skew).transpose(0, 2, 1))
    return solved.transpose(0, 2, 1).astype(np.float64)


def _series(skew: F64, terms: int) -> F64:
    """I + 2 Q + 2 Q² + ... + Q^(terms - 1): the last term counts once"""
    power = np.zeros_like(skew) + np.eye(skew.shape[1])
    made: F64 = power.copy()
    for exponent in range(1, terms):
        power = power @ skew
        made += power if exponent == terms - 1 and terms > 2 else 2 * power
    return made


def held(settings: Settings, matrix: Shape) -> int:
    return 5 * 8 * matrix[1] * int(settings["size"])


KIND = Kind(parts=("oft_R",), settings=settings, rows=rows, held=held, bitwise=False)
