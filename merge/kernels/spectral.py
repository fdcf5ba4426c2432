"""Building blocks of the matrix methods in torch: thin decompositions by the Gram matrix of the shorter side.

All of it is float64. An eigendecomposition of the Gram matrix takes 0.4 of the time of an SVD, and squares the
condition: a singular value of s times the largest is exact to 1e-16/s^2 of itself. Below CUT, far under what
subtracting float32 weights leaves exact, a direction counts as rounding noise and is left out, so that matrices
without full rank give no arbitrary ones.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from merge.kernels.reference import weighted_sum

CUT = 1e-6  # smallest singular value that counts, of the largest


def for_each_matrix(deltas: Tensor, weight: tuple[float, ...], function: Callable[[list[Tensor]], Tensor]) -> Tensor:
    """deltas (model, ..., rows, columns) -> function([w_i d_i (rows, columns) float64]) for each matrix, float64

    Vectors, scalars and what is empty give the mean of the w_i d_i; a matrix with NaN or infinity gives NaN.
    """
    if deltas.dim() < 3 or deltas.numel() == 0:
        return weighted_sum(deltas, weight) / len(deltas)
    merged = torch.empty(deltas.shape[1:], dtype=torch.float64, device=deltas.device)
    matrices = deltas.reshape(len(deltas), -1, *deltas.shape[-2:])
    for place, out in enumerate(merged.view(-1, *merged.shape[-2:])):
        if matrices[:, place].isfinite().all():
            out.copy_(function([d.to(torch.float64) * w for d, w in zip(matrices[:, place], weight, strict=True)]))
        else:
            out.fill_(torch.nan)
    return merged


def thin_svd(matrix: Tensor, rank: int | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """(m, n) -> u (m, k), s (k), v (n, k): the largest singular values first, at most `rank`, all above CUT"""
    if matrix.shape[0] < matrix.shape[1]:
        v, s, u = thin_svd(matrix.T, rank)
        return u, s, v
    values, vectors = torch.linalg.eigh(matrix.T @ matrix)
    kept = _count(values)
    v = vectors.flip(1)[:, : kept if rank is None else min(kept, rank)]
    u = matrix @ v
    s = torch.linalg.vector_norm(u, dim=0)
    return u.div_(s), s, v


def polar(matrix: Tensor) -> Tensor:
    """(m, n) -> the nearest matrix with orthonormal columns (or rows); a partial isometry where rank is missing"""
    if matrix.shape[0] < matrix.shape[1]:
        return polar(matrix.T).T
    return matrix @ _inverse_root(matrix.T @ matrix)


def polar_beside(common: Tensor, extra: Tensor) -> tuple[Tensor, Tensor]:
    """polar() of [common, extra], where the columns of common are orthonormal: as two parts

    Only the directions of common that extra leans on turn, at most as many as extra has columns; the others stay. So
    the decomposition is as large as twice the columns of extra.
    """
    turn, _ = torch.linalg.qr(common.T @ extra)
    leaned_on = common @ turn
    both = polar(torch.cat([leaned_on, extra], dim=1))
    return common + (both[:, : turn.shape[1]] - leaned_on) @ turn.T, both[:, turn.shape[1] :]


def _inverse_root(gram: Tensor) -> Tensor:
    values, vectors = torch.linalg.eigh(gram)
    kept = _count(values)
    used = vectors[:, len(values) - kept :]
    return (used * values[len(values) - kept :].rsqrt()) @ used.T


def _count(values: Tensor) -> int:
    """How many ascending eigenvalues of a Gram matrix are more than noise"""
    return int((values > CUT**2 * values[-1:]).sum()) if len(values) and values[-1] > 0 else 0
