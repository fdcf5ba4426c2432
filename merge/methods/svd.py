"""SVD: the sum of LoRA adapters, truncated to a rank by its largest singular values.

Formula: with sum_i w_i d_i = U S V^T, d_i = s_i B_i A_i the change that adapter i makes (s_i its scaling),
    B = U_r S_r^(1/2), A = S_r^(1/2) V_r^T, the nearest matrix of rank r (Eckart and Young 1936).
The share of the squared length that is kept stands in the manifest, for each module and in all. With `normalize` the
sum is divided by sum_i w_i. Without `rank` it is the largest rank among the adapters. For adapters only.
Cost: QR decompositions of the stacked factors and an SVD as large as the sum of the ranks; the sum is never formed.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

from merge.kernels.weights import factors_of_sum
from merge.methods.parameters import AdapterFactor, Normalize
from merge.methods.registry import OnFactors, Range, method

if TYPE_CHECKING:
    from torch import Tensor

EXAMPLE = """\
merge_method: svd
models:
  - model: org/math-lora
    parameters: {weight: 0.6}
  - model: org/code-lora
    parameters: {weight: 0.4}
parameters:
  rank: 16
"""


@method(
    inputs="adapters",
    locality="tensor",
    base="optional",
    paper="Eckart and Young 1936, The approximation of one matrix by another of lower rank",
    formula="B A = the nearest matrix of rank r to sum_i w_i s_i B_i A_i",
    example=EXAMPLE,
    on_factors=OnFactors(factors_of_sum, rank="largest", balanced=True),
)
def svd(
    deltas: Tensor,
    *,
    weight: AdapterFactor = 1.0,
    normalize: Normalize = False,
    rank: Annotated[int, Range(0), "rank of the result; 0: the largest of the adapters"] = 0,
) -> Tensor:
    """deltas (adapter, out, in) float32 -> nearest to their weighted sum (out, in) float64"""
    from merge.kernels.reference import weighted_sum
    from merge.kernels.spectral import thin_svd
    from merge.kernels.weights import divisor

    u, s, v = thin_svd(weighted_sum(deltas, weight) / divisor(weight, normalize), rank or None)
    return (u * s) @ v.T
