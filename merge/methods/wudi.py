"""WUDI: the matrix that interferes least with all task vectors, using their rows in place of the tasks' inputs.

Paper: Cheng et al. 2025, "Whoever started the interference should end it" (arXiv:2503.08099), section 4.
Formula: y = b + lambda * M, M the least of sum_i w_i (n |(M - d_i) d_i^T|^2 / |d_i|^2 + ridge |M - d_i|^2), which is
    M = [sum_i w_i d_i G_i] [sum_i w_i G_i]^-1,  G_i = n d_i^T d_i / |d_i|^2 + ridge,  n the number of columns,
for vectors the mean of the d_i by weight. The eigenvalues of d_i's part of G_i have mean 1, so `ridge` is relative to
them. Directions that one task has stay as they are, those of several are averaged by strength: one task is that model,
and so are copies of a model. Each matrix of a tensor with more dimensions (fused experts) is one of its own.
Deviations: the paper runs 300 steps of Adam from the sum of task vectors and stops far from the minimum. The minimum
itself divides by the strength of directions in which no task has more than noise, and is no model (exact match on an
earlier quickstart family: 0 to 26 %). Here the ridge does what stopping early does, by drawing such directions to the
mean of the task vectors, in closed form: 0.1 to 1 score 91 %, the paper's steps 89 %. The paper merges the linear
layers only; here embeddings are matrices too, which makes no difference on that family. A task vector that is zero
counts by the ridge alone.
Cost: matrix products for each model and a Cholesky factorisation of the columns' side; in float32 where the result has
16 bits.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Annotated

from merge.methods.parameters import Lambda
from merge.methods.registry import Cost, PerModel, Range, method

if TYPE_CHECKING:
    from torch import Tensor

_PROBES = 8
_OFF = 1e-4  # of its length, most that the result in float32 may be from that in float64
_CONDITION = 400  # of the system, at which it is that

EXAMPLE = """\
merge_method: wudi
base_model: org/base
models:
  - model: org/math
  - model: org/code
parameters:
  lambda: 1.0
dtype: bfloat16
"""


@method(
    inputs="deltas",
    locality="tensor",
    base="required",
    paper="Cheng et al. 2025, Whoever started the interference should end it, arXiv:2503.08099",
    formula="y = b + lambda * [sum_i w_i d_i G_i] [sum_i w_i G_i]^-1, G_i = n d_i^T d_i / |d_i|^2 + ridge",
    example=EXAMPLE,
    float32=True,
    cost=Cost(seconds=6, seconds_each=4.5, elements=4.5, elements_each=1, squares=4, side="columns", float32=0.45),
)
def wudi(
    deltas: Tensor,
    *,
    weight: Annotated[PerModel[float], Range(0.0), "how much the task counts"] = 1.0,
    ridge: Annotated[float, Range(1e-12), "pull towards the mean where task vectors are weak"] = 0.1,
    lambda_: Lambda = 1.0,
    _float32: bool = False,
) -> Tensor:
    """deltas (model, *shape) float32 -> merged task vector (*shape) float64"""
    from merge.kernels.reference import weighted_sum
    from merge.kernels.spectral import for_each_matrix
    from merge.kernels.weights import divisor

    if deltas.dim() < 3 or deltas.numel() == 0:
        return weighted_sum(deltas, weight) * (lambda_ / divisor(weight, normalize=True))
    ones = (1.0,) * len(deltas)
    return lambda_ * for_each_matrix(deltas, ones, lambda matrices: _least(matrices, weight, ridge), _float32)


def _least(matrices: list[Tensor], weight: tuple[float, ...], ridge: float) -> Tensor:
    """The matrix M; empties the list"""
    import torch

    # Solved for the distance from the mean: it has no part in the ridge's term, and of copies it is exactly zero.
    mean = torch.zeros_like(matrices[0])
    for matrix, w in zip(matrices, weight, strict=True):
        mean.add_(matrix, alpha=w / (math.fsum(weight) or 1.0))
    if not any(weight):
        return mean
    columns = mean.shape[1]
    basis = _row_space(matrices, ridge)
    if basis is None:
        return mean + _distance(matrices, mean, weight, ridge, columns)
    within = [matrix @ basis for matrix in matrices]
    return mean + _distance(within, mean @ basis, weight, ridge, columns) @ basis.T


def _row_space(matrices: list[Tensor], ridge: float) -> Tensor | None:
    """(columns, r) orthonormal: what the rows of all matrices are made of, where that is few directions; else None

    What it leaves out of G_i is less than 1e-8 of the ridge.
    """
    import torch

    from merge.kernels.spectral_float32 import CUT
    from merge.kernels.spectral_low_rank import low_rank_svd

    cut, found = min(CUT, (1e-8 * ridge / matrices[0].shape[1]) ** 0.5), []
    for matrix in matrices:
        narrow = low_rank_svd(matrix, cut) if matrix.dtype == torch.float64 else None
        if narrow is None:
            return None
        found.append(narrow[2])
    vectors = torch.cat(found, dim=1)
    return torch.linalg.qr(vectors).Q if vectors.shape[1] < len(vectors) else None


def _distance(matrices: list[Tensor], mean: Tensor, weight: tuple[float, ...], ridge: float, columns: int) -> Tensor:
    """M - mean; `columns` is the n of the formula. Empties the list."""
    import torch

    from merge.kernels.spectral import gram
    from merge.kernels.spectral_float32 import Inexact

    side, float32 = mean.shape[1], mean.dtype == torch.float32
    deltas = list(matrices) if float32 else []
    left, right = torch.zeros_like(mean), mean.new_zeros(side, side)
    for w in weight:
        matrix = matrices.pop(0)
        right.diagonal().add_(w * ridge)
        length = torch.linalg.vector_norm(matrix, dtype=torch.float64)
        if length > 0 and w > 0:
            unit = matrix / length
            strength = gram(unit).mul_(columns)
            if float32 and w * _largest(strength) > _CONDITION * ridge * math.fsum(weight):
                raise Inexact
            right.add_(strength, alpha=w)
            left.addmm_(matrix - mean, strength, alpha=w)
    factor = torch.linalg.cholesky(right)
    distance = torch.cholesky_solve(left.T, factor).T
    if float32:
        _check(mean + distance, deltas, weight, ridge, factor)
    return distance


def _largest(matrix: Tensor) -> float:
    """(n, n) of no negative eigenvalues -> the largest, from below, by powers"""
    import torch

    vector = torch.linalg.vector_norm(matrix, dim=0)
    for _ in range(4):
        vector = matrix @ (vector / torch.linalg.vector_norm(vector))
    return float(torch.linalg.vector_norm(vector))


def _check(merged: Tensor, deltas: list[Tensor], weight: tuple[float, ...], ridge: float, factor: Tensor) -> None:
    """Raises Inexact if float32 left `merged` off by more than _OFF of its length.

    With R = sum_i w_i G_i and random vectors z, (merged - M) z = [sum_i w_i (merged - d_i) G_i] R^-1 z, whose bracket
    is a sum of products with vectors and so is cheap in float64. Its mean square is that of merged - M.
    """
    import numpy as np
    import torch

    from merge.kernels.spectral_float32 import Inexact

    probes = torch.from_numpy(np.random.Generator(np.random.Philox(0)).standard_normal((len(factor), _PROBES)))
    solved = torch.cholesky_solve(probes.to(factor.dtype), factor).to(torch.float64)
    exact, off = merged.to(torch.float64), torch.zeros(len(merged), _PROBES, dtype=torch.float64)
    for delta, w in zip(deltas, weight, strict=True):
        whole = delta.to(torch.float64)
        squares = torch.linalg.vector_norm(whole).square()
        strength = solved * ridge
        if squares > 0:
            strength += whole.T @ (whole @ solved) * (len(factor) / squares)
        off += w * ((exact - whole) @ strength)
    if not torch.linalg.vector_norm(off) <= _OFF * _PROBES**0.5 * torch.linalg.vector_norm(exact):
        raise Inexact
