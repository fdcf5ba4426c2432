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

from typing import TYPE_CHECKING, Annotated, Literal

from merge.kernels.costs import drop_factors
from merge.methods.registry import PerModel, Range, method

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
    weight: Annotated[PerModel[float], "weight of the task vector"],
    density: Annotated[PerModel[float], Range(0.0, 1.0), "probability that an entry is kept"] = 1.0,
    normalize: Annotated[bool, "divide by the sum of the weights"] = False,
    lambda_: Annotated[float, "factor of the merged task vector"] = 1.0,
    rescale: Annotated[Literal[True, False, "l1"], "true: times 1/density; l1: to the old L1 norm"] = True,
    consensus: Annotated[Literal["sum", "count"], "sign of the weighted sum, or of most entries"] = "sum",
    divide_by: Annotated[Literal["weights", "count"], "mean by weights, or by entries that agree"] = "weights",
    merge_func: Annotated[Literal["normalize", "mean", "sum"], "mean or sum, overriding `normalize`"] = "normalize",
    _keys: tuple[int, ...] = (),
) -> Tensor:
    """deltas (model, *shape) float32 -> merged task vector (*shape) float64; _keys: one 64-bit key for each model"""
    from merge.kernels.reference import drop_at_random, elect_and_sum
    from merge.kernels.weights import election

    kept, factors = drop_at_random(deltas, weight, density, _keys, rescale)
    return elect_and_sum(kept, election(weight, factors, normalize, lambda_, consensus, divide_by, merge_func))
