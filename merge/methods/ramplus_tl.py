"""RAM+ (tensor-local): RAM, with entries that only one model changed scaled up to offset the averaged ones.

Paper: "Reinforced Agent Merging" (arXiv:2601.13572).
Formula: as ram, but where model i alone is active its entry counts
    1 + r clamp(shared_i / unique_i, 0, alpha) times,
shared_i and unique_i the numbers of its active entries that others share, and do not, over the tensor.
Deviations: none from mergekit.
Cost: two passes; the first counts.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

from merge.kernels.coefficients import unique_factor
from merge.kernels.costs import one_value
from merge.methods.registry import Range, method

if TYPE_CHECKING:
    from torch import Tensor

EXAMPLE = """\
merge_method: ramplus_tl
base_model: org/base
models:
  - model: org/math-rl
  - model: org/code-rl
parameters:
  r: 0.1
  alpha: 0.2
dtype: bfloat16
"""


@method(
    inputs="deltas",
    locality="tensor",
    base="required",
    paper="Reinforced Agent Merging, arXiv:2601.13572",
    formula="ram with entries of one model times 1 + r clamp(shared_i/unique_i, 0, alpha)",
    example=EXAMPLE,
    reproducible="bitwise",
    fused="merge.kernels.voting:ramplus_tl",
    scratch=one_value,
)
def ramplus_tl(
    deltas: Tensor,
    *,
    epsilon: Annotated[float, Range(0.0), "largest magnitude of a change that is ignored"] = 1e-5,
    r: Annotated[float, "strength of the correction"] = 0.1,
    alpha: Annotated[float, Range(0.0), "most of shared over unique that counts"] = 0.2,
) -> Tensor:
    """deltas (model, *shape) float32 -> merged task vector (*shape) float64"""
    import torch

    wide = deltas.to(torch.float64)
    active = wide.abs() > epsilon
    n_active = active.sum(dim=0)
    total = torch.where(active, wide, 0.0).sum(dim=0) / n_active.clamp(min=1)
    alone = n_active == 1
    for own in active:
        unique = int((own & alone).sum())
        total = torch.where(own & alone, total * unique_factor(int(own.sum()) - unique, unique, r, alpha), total)
    return total
