"""Decomposes a difference into factors: its largest singular vectors, exact or by a randomised range finder.

The error is exact. The kept part is an orthogonal projection of D, so ‖D - B·A‖² = ‖D‖² - sum of the kept s².
Source of the randomised method: Halko, Martinsson, Tropp, SIAM Review 53 (2011), algorithms 4.4 and 5.1.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import xxhash
from torch import Tensor

from merge.kernels.spectral import thin_svd
from merge.tools.extract.difference import MatrixDifference

OVERSAMPLING = 10
POWER_ITERATIONS = 2
_FIRST = 32  # rank that is tried first where only the energy is given
_EXACT_FROM = 0.5  # share of all singular vectors above which the exact method costs no more


@dataclass(frozen=True)
class DecomposedFactors:
    """left (rows, rank) · right (rank, columns), float32; `energy` is ‖D‖², `lost` ‖D - left·right‖².

    Each has the roots of the singular values.
    """

    left: Tensor
    right: Tensor
    energy: float
    lost: float


def decompose(
    difference: MatrixDifference, rank: int | None, energy: float | None, method: str, seed: int
) -> DecomposedFactors | None:
    """Factors of the smallest rank that keeps `energy` of ‖D‖², at most `rank`; None if D is zero.

    Args:
        method: "randomized" or "exact".
        seed: of the random start, together with the tensor's name.
    """
    total = difference.squares()
    if total == 0.0:
        return None
    full = min(difference.rows, difference.columns)
    wanted = min(rank if rank is not None else full, full)
    if method == "exact":
        u, s, v = thin_svd(difference.whole(), wanted)
    elif energy is None:
        u, s, v = _sketch(difference, wanted, seed)
    else:
        u, s, v = _until(difference, wanted, energy * total, seed)
    squares = torch.cumsum(s * s, 0)
    count = min(wanted, len(s))
    if energy is not None:
        count = min(count, int(torch.searchsorted(squares, energy * total)) + 1)
    roots = s[:count].sqrt()
    left, right = (u[:, :count] * roots), (v[:, :count] * roots).T
    lost = max(0.0, total - float(squares[count - 1]))
    return DecomposedFactors(left.float().contiguous(), right.float().contiguous(), total, lost)


def _until(difference: MatrixDifference, wanted: int, energy: float, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Sketches that double until they hold the energy."""
    tried = min(_FIRST, wanted)
    while True:
        u, s, v = _sketch(difference, tried, seed)
        if tried >= wanted or float((s[:tried] * s[:tried]).sum()) >= energy:
            return u, s, v
        tried = min(2 * tried, wanted)


def _sketch(difference: MatrixDifference, rank: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """u (rows, k), s (k), v (columns, k) with k >= rank of D's projection on what it makes of random vectors."""
    width = rank + OVERSAMPLING
    if width >= _EXACT_FROM * min(difference.rows, difference.columns):
        return thin_svd(difference.whole())
    key = xxhash.xxh3_64_intdigest(f"{seed}\0{difference.pair.name}".encode())
    random = np.random.Generator(np.random.Philox(key)).standard_normal((difference.columns, width))
    q = _orthonormal(difference.times(torch.from_numpy(random)))
    for _ in range(POWER_ITERATIONS):
        q = _orthonormal(difference.times(_orthonormal(difference.transposed_times(q))))
    v, s, turn = torch.linalg.svd(difference.transposed_times(q), full_matrices=False)
    return q @ turn.T, s, v


def _orthonormal(matrix: Tensor) -> Tensor:
    return torch.linalg.qr(matrix).Q
