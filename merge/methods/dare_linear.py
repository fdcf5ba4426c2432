"""DARE with no election: drop entries of task vectors at random and rescale, then add.

Paper: Yu et al. 2024, "Language models are super Mario" (arXiv:2311.03099), section 3.
Formula: y = b + lambda * sum_i w_i m_i d_i / p_i,
m_i ~ Bernoulli(p_i), p_i the density.
Deviations: the mask is a function of (seed, tensor name, model, element), the same on any machine. `rescale: true` is
the paper's unbiased 1/p; mergekit restores the L1 norm instead, which is `rescale: l1` here.
Cost: one pass; with `rescale: l1` two.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from merge.kernels.costs import drop_factors
from merge.methods.parameters import KeptProbability, Lambda, Normalize, RescaleDropped, Weight
from merge.methods.registry import method

if TYPE_CHECKING:
    from torch import Tensor

EXAMPLE = """\
merge_method: dare_linear
base_model: org/base
models:
  - model: org/math
    parameters: {weight: 0.5, density: 0.5}
  - model: org/code
    parameters: {weight: 0.5, density: 0.3}
dtype: bfloat16
seed: 7
"""


@method(
    inputs="deltas",
    locality="element",
    base="required",
    paper="Yu et al. 2024, Language models are super Mario, arXiv:2311.03099",
    formula="y = b + lambda * sum_i w_i m_i d_i / p_i",
    example=EXAMPLE,
    reproducible="bitwise",
    fused="merge.kernels.task_vectors:dare_linear",
    scratch=drop_factors,
    random=True,
)
def dare_linear(
    deltas: Tensor,
    *,
    weight: Weight,
    density: KeptProbability = 1.0,
    normalize: Normalize = False,
    lambda_: Lambda = 1.0,
    rescale: RescaleDropped = True,
    _keys: tuple[int, ...] = (),
) -> Tensor:
    """deltas (model, *shape) float32 -> merged task vector (*shape) float64; _keys: one 64-bit key for each model"""
    from merge.kernels.reference import drop_at_random, weighted_sum
    from merge.kernels.weights import divisor

    kept, factors = drop_at_random(deltas, weight, density, _keys, rescale)
    return lambda_ / divisor(weight, normalize) * weighted_sum(kept, factors)
