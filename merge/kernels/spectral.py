"""Building blocks of the matrix methods in torch: thin decompositions by the Gram matrix of the shorter side.

An eigendecomposition of the Gram matrix takes 0.4 of the time of an SVD, and squares the condition: in float64 a
singular value of s times the largest is exact to 1e-16/s^2 of itself. Below CUT, far under what subtracting float32
weights leaves exact, a direction counts as rounding noise and is left out, so that matrices without full rank give no
arbitrary ones.

Definitions are float64. The engine asks for float32 where the result is rounded to 16 bits; these functions then get
large matrices in float32, and raise Inexact where that does not do.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from merge.kernels import spectral_float32
from merge.kernels.reference import weighted_sum
from merge.kernels.spectral_float32 import CUT, Inexact
from merge.kernels.spectral_low_rank import low_rank_svd

FLOAT32_FROM = 1024  # smaller side of a matrix from which float32 is quicker


def for_each_matrix(
    deltas: Tensor, weight: tuple[float, ...], function: Callable[[list[Tensor]], Tensor], float32: bool = False
) -> Tensor:
    """deltas (model, ..., rows, columns) -> function([w_i d_i (rows, columns) float64]) for each matrix, float64

    With `float32` large matrices are float32, unless the function raises Inexact. Vectors, scalars and what is empty
    give the mean of the w_i d_i; a matrix with NaN or infinity gives NaN.
    """
    if deltas.dim() < 3 or deltas.numel() == 0:
        return weighted_sum(deltas, weight) / len(deltas)
    merged = torch.empty(deltas.shape[1:], dtype=torch.float64, device=deltas.device)
    matrices = deltas.reshape(len(deltas), -1, *deltas.shape[-2:])
    for place, out in enumerate(merged.view(-1, *merged.shape[-2:])):
        if matrices[:, place].isfinite().all():
            out.copy_(_of_one(matrices[:, place], weight, function, float32))
        else:
            out.fill_(torch.nan)
    return merged


def _of_one(
    deltas: Tensor, weight: tuple[float, ...], function: Callable[[list[Tensor]], Tensor], float32: bool
) -> Tensor:
    float32 = float32 and deltas.dtype == torch.float32 and min(deltas.shape[1:]) >= FLOAT32_FROM
    if float32 and low_rank_svd(deltas[0].to(torch.float64), CUT) is None:  # which float64 does exactly and sooner
        try:
            return function([d * w for d, w in zip(deltas, weight, strict=True)])
        except (Inexact, torch.linalg.LinAlgError):
            pass
    return function([d.to(torch.float64) * w for d, w in zip(deltas, weight, strict=True)])


def thin_svd(matrix: Tensor, rank: int | None = None, largest: float = 0.0) -> tuple[Tensor, Tensor, Tensor]:
    """(m, n) -> u (m, k), s (k), v (n, k): the largest singular values first, at most `rank`, all above CUT

    CUT is relative to `largest` if that is more than the matrix's own largest singular value.
    """
    if matrix.dtype == torch.float32:
        return spectral_float32.thin_svd(matrix, rank)
    narrow = low_rank_svd(matrix, CUT, largest)
    if narrow is not None:
        u, s, v = narrow
        return u[:, :rank], s[:rank], v[:, :rank]
    if matrix.shape[0] < matrix.shape[1]:
        v, s, u = _decomposed(matrix.T, rank, largest)
        return u, s, v
    return _decomposed(matrix, rank, largest)


def _decomposed(matrix: Tensor, rank: int | None, largest: float) -> tuple[Tensor, Tensor, Tensor]:
    values, vectors = torch.linalg.eigh(matrix.T @ matrix)
    kept = _count(values, largest)
    v = vectors.flip(1)[:, : kept if rank is None else min(kept, rank)]
    u = matrix @ v
    s = torch.linalg.vector_norm(u, dim=0)
    return u.div_(s), s, v


def gram(matrix: Tensor) -> Tensor:
    """(m, n) -> A^T A (n, n)"""
    return spectral_float32.gram(matrix) if matrix.dtype == torch.float32 else matrix.T @ matrix


def complement(u: Tensor) -> Tensor:
    """(m, k) with orthonormal columns -> (m, m - k), orthonormal columns that are orthogonal to them"""
    rows, columns = u.shape
    rest = u.new_zeros(rows, rows - columns)
    rest[columns:].fill_diagonal_(1.0)
    return torch.ormqr(*torch.geqrf(u), rest)


def polar(matrix: Tensor) -> Tensor:
    """(m, n) -> the nearest matrix with orthonormal columns (or rows); a partial isometry where rank is missing"""
    if matrix.dtype == torch.float32:
        return spectral_float32.polar(matrix)
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


def _count(values: Tensor, largest: float = 0.0) -> int:
    """How many ascending eigenvalues of a Gram matrix are more than noise"""
    if not len(values) or values[-1] <= 0:
        return 0
    return int((values > CUT**2 * max(float(values[-1]), largest**2)).sum())
