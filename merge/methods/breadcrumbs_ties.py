"""Breadcrumbs with sign election: drop the largest and the smallest entries, then elect signs as TIES does.

Paper: Davari and Belilovsky 2023, "Model Breadcrumbs" (arXiv:2312.06795), section 3.
Formula: y = b + lambda * sum of the w_i m_i d_i that agree with the sign of their sum,
m_i dropping the floor(gamma n) entries of largest magnitude and keeping the next k = max(1, floor(density n)). Where
there are fewer than k left, gamma shrinks. Of equal magnitudes the lowest flat index counts as larger.
Deviations: mergekit may keep no entry of a small tensor, and takes equal magnitudes in arbitrary order. `rescale` (true
or l1) restores the L1 norm, as in mergekit; the paper does not rescale.
Variants of election and mean: `consensus`, `divide_by`, `merge_func`, see ties.
Cost: one pass to find both thresholds by histogram (no sort), at most one to place ties, one to combine.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal

from merge.kernels.costs import trimming
from merge.methods.parameters import Consensus, DivideBy, Gamma, KeptShare, Lambda, MergeFunc, Normalize, Weight
from merge.methods.registry import method

if TYPE_CHECKING:
    from torch import Tensor

EXAMPLE = """\
merge_method: breadcrumbs_ties
base_model: org/base
models:
  - model: org/math
    parameters: {weight: 0.5, density: 0.5, gamma: 0.02}
  - model: org/code
    parameters: {weight: 0.3, density: 0.6}
dtype: bfloat16
"""


@method(
    inputs="deltas",
    locality="tensor",
    base="required",
    paper="Davari and Belilovsky 2023, Model Breadcrumbs, arXiv:2312.06795",
    formula="y = b + lambda * sum of the w_i m_i d_i that agree with the elected sign",
    example=EXAMPLE,
    reproducible="bitwise",
    fused="merge.kernels.task_vectors:breadcrumbs_ties",
    scratch=trimming,
)
def breadcrumbs_ties(
    deltas: Tensor,
    *,
    weight: Weight,
    density: KeptShare = 1.0,
    gamma: Gamma = 0.01,
    normalize: Normalize = False,
    lambda_: Lambda = 1.0,
    rescale: Annotated[Literal[False, True, "l1"], "restore the L1 norm of the task vector"] = False,
    consensus: Consensus = "sum",
    divide_by: DivideBy = "weights",
    merge_func: MergeFunc = "normalize",
) -> Tensor:
    """deltas (model, *shape) float32 -> merged task vector (*shape) float64"""
    import torch

    from merge.kernels.reference import elect_and_sum, keep_inliers, l1_factors
    from merge.kernels.weights import election

    kept = torch.stack([keep_inliers(d, *shares) for d, *shares in zip(deltas, density, gamma, strict=True)])
    factors = l1_factors(weight, deltas, kept) if rescale else weight
    return elect_and_sum(kept, election(weight, factors, normalize, lambda_, consensus, divide_by, merge_func))
