"""Cat: the exact sum of LoRA adapters, by concatenating their factors.

Formula: A = [A_1; ..; A_n], B = [w_1 s_1 B_1, .., w_n s_n B_n], so that B A = sum_i w_i s_i B_i A_i, s_i the scaling of
adapter i (alpha/r, or alpha/sqrt(r) for rsLoRA). A negative weight subtracts.
The rank is the sum of the ranks, and alpha equals it. For adapters only.
Cost: factors are copied; no matrix is formed.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from merge.kernels.weights import factors_of_sum
from merge.methods.parameters import AdapterFactor
from merge.methods.registry import OnFactors, method

if TYPE_CHECKING:
    from torch import Tensor

EXAMPLE = """\
merge_method: cat
models:
  - model: org/math-lora
  - model: org/toxic-lora
    parameters: {weight: -0.5}
"""


@method(
    inputs="adapters",
    locality="tensor",
    base="optional",
    formula="B A = sum_i w_i s_i B_i A_i, exactly",
    example=EXAMPLE,
    reproducible="bitwise",
    on_factors=OnFactors(factors_of_sum, rank="all"),
)
def cat(
    deltas: Tensor,
    *,
    weight: AdapterFactor = 1.0,
) -> Tensor:
    """deltas (adapter, out, in) float32 -> their weighted sum (out, in) float64"""
    from merge.kernels.reference import weighted_sum

    return weighted_sum(deltas, weight)
