"""Iso-C: the sum of task vectors with all its singular values made equal.

Paper: Marczak et al. 2025, "No task left behind" (arXiv:2502.04959), section 4.2.
Formula: with the thin SVD of a matrix sum_i w_i d_i = U S V^T, and s the mean of its r singular values,
    y = b + lambda * s U V^T,  for vectors y = b + lambda * mean(w_i d_i).
The nuclear norm of the sum stays. Each matrix of a tensor with more dimensions (fused experts) is one of its own.
Deviations: directions below 1e-6 of the largest singular value are rounding noise and stay out, and the mean is over
the others; the paper's program gives them full strength in directions that the SVD happens to return. A task vector
saved in bfloat16 has full rank by its rounding, also after LoRA: this amplifies noise, here as there.
Embeddings are matrices like others.
Cost: an eigendecomposition of the shorter side, whatever the number of models; in float32 where the result has 16 bits.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

from merge.methods.parameters import Lambda
from merge.methods.registry import Cost, PerModel, method

if TYPE_CHECKING:
    from torch import Tensor

EXAMPLE = """\
merge_method: iso_c
base_model: org/base
models:
  - model: org/math
  - model: org/code
parameters:
  lambda: 1.2
dtype: bfloat16
"""


@method(
    inputs="deltas",
    locality="tensor",
    base="required",
    paper="Marczak et al. 2025, No task left behind, arXiv:2502.04959",
    formula="y = b + lambda * mean(S) U V^T, where U S V^T = sum_i w_i d_i",
    example=EXAMPLE,
    float32=True,
    cost=Cost(seconds=22, seconds_each=0.5, elements=3.5, elements_each=0.7, squares=1.5, float32=0.55),
)
def iso_c(
    deltas: Tensor,
    *,
    weight: Annotated[PerModel[float], "factor of the task vector in the sum"] = 1.0,
    lambda_: Lambda = 1.0,
    _float32: bool = False,
) -> Tensor:
    """deltas (model, *shape) float32 -> merged task vector (*shape) float64"""
    from merge.kernels.spectral import for_each_matrix, thin_svd

    def merge(matrices: list[Tensor]) -> Tensor:
        total = matrices.pop(0)
        while matrices:
            total += matrices.pop(0)
        u, s, v = thin_svd(total)
        return (u * (s.sum() / max(1, len(s)))) @ v.T

    return lambda_ * for_each_matrix(deltas, weight, merge, _float32)
