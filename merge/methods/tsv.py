"""TSV: keep each task's strongest singular directions, and make them orthogonal to those of the other tasks.

Paper: Gargiulo et al. 2024, "Task singular vectors" (arXiv:2412.00081), section 4, algorithm 1 (TSV-Merge).
Formula: of T tasks, each w_i d_i = U_i S_i V_i^T of a matrix with r singular values keeps its k = floor(density r / T)
largest; with [.] the nearest matrix with orthonormal columns, of all of them side by side,
    y = b + lambda * [U_1 .. U_T] diag(S_1 .. S_T) [V_1 .. V_T]^T,  for vectors y = b + lambda * mean(w_i d_i).
One task with density 1 is that model; the order of models does not matter. Each matrix of a tensor with more
dimensions (fused experts) is one of its own. `density` is 1 in the paper.
Deviations: matrices with fewer directions than tasks are merged as vectors are (the paper's program gives zero).
Directions below 1e-6 of a largest singular value are rounding noise and stay out; where tasks share a direction
exactly (copies of a model) the program makes up others in its place, and here it is taken once, by their mean
strength. Embeddings are matrices like others.
Cost: an eigendecomposition of the shorter side for each model, and two for the orthogonal factors; in float32 where
the result has 16 bits. Task vectors of low rank take a fiftieth of that.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

from merge.methods.parameters import Factor, Lambda
from merge.methods.registry import Cost, Range, method

if TYPE_CHECKING:
    from torch import Tensor

EXAMPLE = """\
merge_method: tsv
base_model: org/base
models:
  - model: org/math
  - model: org/code
  - model: org/law
    parameters: {weight: 0.8}
parameters:
  lambda: 1.0
dtype: bfloat16
"""


@method(
    inputs="deltas",
    locality="tensor",
    base="required",
    paper="Gargiulo et al. 2024, Task singular vectors, arXiv:2412.00081",
    formula="y = b + lambda * U S V^T, U and V the singular directions of all w_i d_i made orthogonal",
    example=EXAMPLE,
    float32=True,
    cost=Cost(seconds=40, seconds_each=23, elements=2.5, elements_each=1.1, squares=2.5, float32=0.55),
)
def tsv(
    deltas: Tensor,
    *,
    weight: Factor = 1.0,
    density: Annotated[float, Range(0.0, 1.0), "share of its r/T directions that a task keeps"] = 1.0,
    lambda_: Lambda = 1.0,
    _float32: bool = False,
) -> Tensor:
    """deltas (model, *shape) float32 -> merged task vector (*shape) float64"""
    from merge.kernels.reference import weighted_sum
    from merge.kernels.spectral import for_each_matrix

    if deltas.dim() > 2 and min(deltas.shape[-2:]) < len(deltas):
        return weighted_sum(deltas, weight) * (lambda_ / len(deltas))

    def merge(matrices: list[Tensor]) -> Tensor:
        u, s, v = factors(matrices, int(density * (min(matrices[0].shape) // len(matrices))))
        return (u * s) @ v.T

    return lambda_ * for_each_matrix(deltas, weight, merge, _float32)


def factors(matrices: list[Tensor], rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """The U, S and V of the formula, with `rank` directions from each matrix; empties the list"""
    import torch

    from merge.kernels.spectral import polar, thin_svd

    parts = []
    while matrices:
        parts.append(thin_svd(matrices.pop(0), rank))
    u, s, v = (torch.cat(part, dim=-1) for part in zip(*parts, strict=True))
    if len(parts) == 1:
        return u, s, v
    parts.clear()
    return polar(u), s, polar(v)
