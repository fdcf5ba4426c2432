"""RAM: keep entries that only one model changed, and average entries that several changed over those models.

Paper: "Reinforced Agent Merging" (arXiv:2601.13572).
Formula: A = {i: |d_i| > epsilon}, y = b + sum_{i in A} d_i / |A|, element by element; y = b where A is empty.
Deviations: none from mergekit.
Cost: one pass.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

from merge.methods.registry import Range, method

if TYPE_CHECKING:
    from torch import Tensor

EXAMPLE = """\
merge_method: ram
base_model: org/base
models:
  - model: org/math-rl
  - model: org/code-rl
parameters:
  epsilon: 1.0e-5
dtype: bfloat16
"""


@method(
    inputs="deltas",
    locality="element",
    base="required",
    paper="Reinforced Agent Merging, arXiv:2601.13572",
    formula="y = b + mean of those d_i with |d_i| > epsilon",
    example=EXAMPLE,
    reproducible="bitwise",
    fused="merge.kernels.voting:ram",
)
def ram(
    deltas: Tensor, *, epsilon: Annotated[float, Range(0.0), "largest magnitude of a change that is ignored"] = 1e-5
) -> Tensor:
    """deltas (model, *shape) float32 -> merged task vector (*shape) float64"""
    import torch

    wide = deltas.to(torch.float64)
    active = wide.abs() > epsilon
    return torch.where(active, wide, 0.0).sum(dim=0) / active.sum(dim=0).clamp(min=1)
