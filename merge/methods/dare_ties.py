"""DARE with sign election: drop entries of task vectors at random and rescale, then elect signs as TIES does.

Paper: Yu et al. 2024, "Language models are super Mario" (arXiv:2311.03099), section 3.
Formula: y = b + lambda * mean of the masked, rescaled w_i d_i that agree with the elected sign,
m_i ~ Bernoulli(p_i), p_i the density.
Deviations: the mask is a function of (seed, tensor name, model, element), the same on any machine. `rescale: true` is
the paper's unbiased 1/p; mergekit restores the L1 norm instead, which is `rescale: l1` here.
Variants of election and mean: `consensus`, `divide_by`, `merge_func`, see ties.
Cost: one pass; with `rescale: l1` two.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from merge.kernels.costs import drop_factors
from merge.methods.parameters import (
    Consensus,
    DivideBy,
    KeptProbability,
    Lambda,
    MergeFunc,
    Normalize,
    RescaleDropped,
    Weight,
)
from merge.methods.registry import method

if TYPE_CHECKING:
    from torch import Tensor

EXAMPLE = """\
merge_method: dare_ties
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
    formula="y = b + lambda * mean of the masked, rescaled w_i d_i that agree with the elected sign",
    example=EXAMPLE,
    reproducible="bitwise",
    fused="merge.kernels.task_vectors:dare_ties",
    scratch=drop_factors,
    random=True,
)
def dare_ties(
    deltas: Tensor,
    *,
    weight: Weight,
    density: KeptProbability = 1.0,
    normalize: Normalize = False,
    lambda_: Lambda = 1.0,
    rescale: RescaleDropped = True,
    consensus: Consensus = "sum",
    divide_by: DivideBy = "weights",
    merge_func: MergeFunc = "normalize",
    _keys: tuple[int, ...] = (),
) -> Tensor:
    """deltas (model, *shape) float32 -> merged task vector (*shape) float64; _keys: one 64-bit key for each model"""
    from merge.kernels.reference import drop_at_random, elect_and_sum
    from merge.kernels.weights import election

    kept, factors = drop_at_random(deltas, weight, density, _keys, rescale)
    return elect_and_sum(kept, election(weight, factors, normalize, lambda_, consensus, divide_by, merge_func))
