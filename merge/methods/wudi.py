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
Cost: matrix products for each model and a Cholesky factorisation of the columns' side, in float64.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Annotated

from merge.methods.parameters import Lambda
from merge.methods.registry import Cost, PerModel, Range, method

if TYPE_CHECKING:
    from torch import Tensor

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
    cost=Cost(seconds=6, seconds_each=4.5, elements=4.5, elements_each=1, squares=4, side="columns"),
)
def wudi(
    deltas: Tensor,
    *,
    weight: Annotated[PerModel[float], Range(0.0), "how much the task counts"] = 1.0,
    ridge: Annotated[float, Range(1e-12), "pull towards the mean where task vectors are weak"] = 0.1,
    lambda_: Lambda = 1.0,
) -> Tensor:
    """deltas (model, *shape) float32 -> merged task vector (*shape) float64"""
    from merge.kernels.reference import weighted_sum
    from merge.kernels.spectral import for_each_matrix
    from merge.kernels.weights import divisor

    if deltas.dim() < 3 or deltas.numel() == 0:
        return weighted_sum(deltas, weight) * (lambda_ / divisor(weight, normalize=True))
    ones = (1.0,) * len(deltas)
    return lambda_ * for_each_matrix(deltas, ones, lambda matrices: _least(matrices, weight, ridge))


def _least(matrices: list[Tensor], weight: tuple[float, ...], ridge: float) -> Tensor:
    import torch

    # Solved for the distance from the mean: it has no part in the ridge's term, and of copies it is exactly zero.
    columns = matrices[0].shape[1]
    mean = torch.zeros_like(matrices[0])
    for matrix, w in zip(matrices, weight, strict=True):
        mean.add_(matrix, alpha=w / (math.fsum(weight) or 1.0))
    left, right = torch.zeros_like(mean), mean.new_zeros(columns, columns)
    for w in weight:
        matrix = matrices.pop(0)
        right.diagonal().add_(w * ridge)
        length = torch.linalg.vector_norm(matrix)
        if length > 0 and w > 0:
            unit = matrix / length
            gram = (unit.T @ unit).mul_(columns)
            right.add_(gram, alpha=w)
            left.addmm_(matrix - mean, gram, alpha=w)
    return mean + torch.cholesky_solve(left.T, torch.linalg.cholesky(right)).T if any(weight) else mean
