"""Iso-CTS: Iso-C, with the weakest directions of the sum replaced by directions of single tasks outside it.

Paper: Marczak et al. 2025, "No task left behind" (arXiv:2502.04959), section 4.3, algorithm 2.
Formula: of the r singular directions U, V of the matrix sum_i w_i d_i the strongest, a share `common`, stay: U_c, V_c.
Each of the T tasks adds the (1 - common) r / T strongest singular directions of its w_i d_i - U_c U_c^T w_i d_i. With
[.] the nearest matrix with orthonormal columns and s the mean of all these singular values,
    y = b + lambda * s [U_c, U_1, .. U_T] [V_c, V_1, .. V_T]^T,  for vectors y = b + lambda * mean(w_i d_i).
Directions are rounded so that tasks have equally many, as in the paper's program. With one task, and with `common` 1,
this is iso_c. Each matrix of a tensor with more dimensions (fused experts) is one of its own.
Deviations: as for iso_c, directions of rounding noise stay out, and so does what tasks have in double.
Cost: an eigendecomposition of the shorter side, small ones for the rest; where a matrix has more rows than columns one
more for each model. In float32 where the result has 16 bits.
"""

from __future__ import annotations

from functools import reduce
from typing import TYPE_CHECKING, Annotated

from merge.methods.parameters import Factor, Lambda
from merge.methods.registry import Cost, Range, method

if TYPE_CHECKING:
    from torch import Tensor

EXAMPLE = """\
merge_method: iso_cts
base_model: org/base
models:
  - model: org/math
  - model: org/code
  - model: org/law
parameters:
  common: 0.8
  lambda: 1.2
dtype: bfloat16
"""


@method(
    inputs="deltas",
    locality="tensor",
    base="required",
    paper="Marczak et al. 2025, No task left behind, arXiv:2502.04959",
    formula="y = b + lambda * mean(S) U V^T, directions of sum_i w_i d_i and, orthogonal to them, of each w_i d_i",
    example=EXAMPLE,
    float32=True,
    cost=Cost(seconds=30, seconds_each=5, elements=5, elements_each=1.5, squares=1.5, float32=0.6),
)
def iso_cts(
    deltas: Tensor,
    *,
    weight: Factor = 1.0,
    common: Annotated[float, Range(0.0, 1.0), "share of the directions that come from the sum"] = 0.8,
    lambda_: Lambda = 1.0,
    _float32: bool = False,
) -> Tensor:
    """deltas (model, *shape) float32 -> merged task vector (*shape) float64"""
    from merge.kernels.spectral import for_each_matrix

    return lambda_ * for_each_matrix(deltas, weight, lambda matrices: _merge(matrices, common), _float32)


def _merge(matrices: list[Tensor], common: float) -> Tensor:
    import torch

    from merge.kernels.spectral import complement, polar_beside, thin_svd

    rows, columns = matrices[0].shape
    rank, n = min(rows, columns), len(matrices)
    own = min(rank // n, round((rank - int(rank * common)) / n))
    u, s, v = thin_svd(reduce(torch.add, matrices), rank - own * n)
    if own == 0:
        return (u * (s.sum() / max(1, len(s)))) @ v.T
    # In U_c's orthogonal complement, unless that is nearly all, the tasks' matrices are smaller.
    rest = complement(u) if rows <= columns and 16 * len(s) >= rows else None
    largest = float(s[:1].sum())  # of the sum: what tasks have beside it may be noise, all of it
    tasks = []
    while matrices:
        matrix = matrices.pop(0)
        if rest is None:
            tasks.append(thin_svd(matrix.addmm_(u, u.T @ matrix, alpha=-1.0), own, largest))
        else:
            u_own, s_own, v_own = thin_svd(rest.T @ matrix, own, largest)
            tasks.append((rest @ u_own, s_own, v_own))
    u_own, s_own, v_own = (torch.cat(part, dim=-1) for part in zip(*tasks, strict=True))
    u, u_own = polar_beside(u, u_own)
    v, v_own = polar_beside(v, v_own)
    strength = torch.cat([s, s_own]).sum() / max(1, len(s) + len(s_own))
    return strength * (u @ v.T + u_own @ v_own.T)
