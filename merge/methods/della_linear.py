"""DELLA with no election: drop entries at random, large ones less often, then add.

Paper: Deep et al. 2024, "DELLA-Merging" (arXiv:2406.11617), section 3.
Formula: y = b + lambda * sum_i w_i m_i d_i / p_i,
m_i ~ Bernoulli(p_i), p_i rising with the rank of |d_i| in its row (last dimension) from density - epsilon to
density + epsilon in equal steps. A vector is one row; in a row of one entry p is the density. density 1 keeps all.
Deviations: the mask is a function of (seed, tensor name, model, element), the same on any machine; of equal magnitudes
the earlier has the lower rank. `rescale: true` is the paper's unbiased 1/p_i; mergekit restores the L1 norm instead,
which is `rescale: l1` here. mergekit ranks along the second dimension, which differs beyond matrices.
Cost: one pass, with a sort of each row in vector registers; with `rescale: l1` two.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from merge.kernels.costs import ranks
from merge.methods.parameters import Epsilon, Lambda, MeanKeptProbability, Normalize, RescaleRanked, Weight
from merge.methods.registry import check_rank_probabilities, method

if TYPE_CHECKING:
    from torch import Tensor

EXAMPLE = """\
merge_method: della_linear
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
    formula="y = b + lambda * sum_i w_i m_i d_i / p_i",
    example=EXAMPLE,
    reproducible="bitwise",
    check=check_rank_probabilities,
    fused="merge.kernels.task_vectors:della_linear",
    scratch=ranks,
    random=True,
)
def della_linear(
    deltas: Tensor,
    *,
    weight: Weight,
    density: MeanKeptProbability = 1.0,
    epsilon: Epsilon = 0.15,
    normalize: Normalize = False,
    lambda_: Lambda = 1.0,
    rescale: RescaleRanked = True,
    _keys: tuple[int, ...] = (),
) -> Tensor:
    """deltas (model, *shape) float32 -> merged task vector (*shape) float64; _keys: one 64-bit key for each model"""
    from merge.kernels.reference import drop_by_rank, weighted_sum
    from merge.kernels.weights import divisor

    kept, factors = drop_by_rank(deltas, weight, density, epsilon, _keys, rescale)
    return lambda_ / divisor(weight, normalize) * weighted_sum(kept, factors)
