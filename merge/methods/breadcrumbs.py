"""Breadcrumbs: drop the largest and the smallest entries of each task vector, then add what is left.

Paper: Davari and Belilovsky 2023, "Model Breadcrumbs" (arXiv:2312.06795), section 3.
Formula: y = b + lambda * sum_i w_i m_i d_i,
m_i dropping the floor(gamma n) entries of largest magnitude and keeping the next k = max(1, floor(density n)). Where
there are fewer than k left, gamma shrinks. Of equal magnitudes the lowest flat index counts as larger.
Deviations: mergekit may keep no entry of a small tensor, and takes equal magnitudes in arbitrary order. `rescale` (true
or l1) restores the L1 norm, as in mergekit; the paper does not rescale.
Cost: one pass to find both thresholds by histogram (no sort), at most one to place ties, one to combine.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal

from merge.kernels.costs import trimming
from merge.methods.parameters import Gamma, KeptShare, Lambda, Normalize, Weight
from merge.methods.registry import method

if TYPE_CHECKING:
    from torch import Tensor

EXAMPLE = """\
merge_method: breadcrumbs
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
    formula="y = b + lambda * sum_i w_i m_i d_i",
    example=EXAMPLE,
    reproducible="bitwise",
    fused="merge.kernels.task_vectors:breadcrumbs",
    scratch=trimming,
)
def breadcrumbs(
    deltas: Tensor,
    *,
    weight: Weight,
    density: KeptShare = 1.0,
    gamma: Gamma = 0.01,
    normalize: Normalize = False,
    lambda_: Lambda = 1.0,
    rescale: Annotated[Literal[False, True, "l1"], "restore the L1 norm of the task vector"] = False,
) -> Tensor:
    """deltas (model, *shape) float32 -> merged task vector (*shape) float64"""
    import torch

    from merge.kernels.reference import keep_inliers, l1_factors, weighted_sum
    from merge.kernels.weights import divisor

    kept = torch.stack([keep_inliers(d, *shares) for d, *shares in zip(deltas, density, gamma, strict=True)])
    factors = l1_factors(weight, deltas, kept) if rescale else weight
    return lambda_ / divisor(weight, normalize) * weighted_sum(kept, factors)
