"""DELLA: drop entries at random, large ones less often, then elect signs and average what agrees.

Paper: Deep et al. 2024, "DELLA-Merging" (arXiv:2406.11617), section 3.
Formula: y = b + lambda * mean of the w_i m_i d_i / p_i that agree with the elected sign,
m_i ~ Bernoulli(p_i), p_i rising with the rank of |d_i| in its row (last dimension) from density - epsilon to
density + epsilon in equal steps. A vector is one row; in a row of one entry p is the density. density 1 keeps all.
Deviations: the mask is a function of (seed, tensor name, model, element), the same on any machine; of equal magnitudes
the earlier has the lower rank. `rescale: true` is the paper's unbiased 1/p_i; mergekit restores the L1 norm instead,
which is `rescale: l1` here. mergekit ranks along the second dimension, which differs beyond matrices.
Variants of election and mean: `consensus`, `divide_by`, `merge_func`, see ties.
Cost: one pass, with a sort of each row in vector registers; with `rescale: l1` two.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from merge.kernels.costs import ranks
from merge.methods.parameters import (
    Consensus,
    DivideBy,
    Epsilon,
    Lambda,
    MeanKeptProbability,
    MergeFunc,
    NormalizeAgreeing,
    RescaleRanked,
    Weight,
)
from merge.methods.registry import check_rank_probabilities, method

if TYPE_CHECKING:
    from torch import Tensor

EXAMPLE = """\
merge_method: della
base_model: org/base
models:
  - model: org/math
    parameters: {weight: 0.5, density: 0.5, epsilon: 0.1}
  - model: org/code
    parameters: {weight: 0.3, density: 0.6}
dtype: bfloat16
seed: 7
"""


@method(
    inputs="deltas",
    locality="row",
    base="required",
    paper="Deep et al. 2024, DELLA-Merging, arXiv:2406.11617",
    formula="y = b + lambda * mean of the w_i m_i d_i / p_i that agree with the elected sign",
    example=EXAMPLE,
    reproducible="bitwise",
    check=check_rank_probabilities,
    fused="merge.kernels.task_vectors:della",
    scratch=ranks,
    random=True,
)
def della(
    deltas: Tensor,
    *,
    weight: Weight,
    density: MeanKeptProbability = 1.0,
    epsilon: Epsilon = 0.15,
    normalize: NormalizeAgreeing = True,
    lambda_: Lambda = 1.0,
    rescale: RescaleRanked = True,
    consensus: Consensus = "sum",
    divide_by: DivideBy = "weights",
    merge_func: MergeFunc = "normalize",
    _keys: tuple[int, ...] = (),
) -> Tensor:
    """deltas (model, *shape) float32 -> merged task vector (*shape) float64; _keys: one 64-bit key for each model"""
    from merge.kernels.reference import drop_by_rank, elect_and_sum
    from merge.kernels.weights import election

    kept, factors = drop_by_rank(deltas, weight, density, epsilon, _keys, rescale)
    return elect_and_sum(kept, election(weight, factors, normalize, lambda_, consensus, divide_by, merge_func))
