"""MagMax: keep each entry's change of largest magnitude.

Paper: Marczak et al. 2024, "MagMax" (arXiv:2407.06322).
Formula: y = b + lambda d_k, k = argmax_i |d_i|, element by element; of equal magnitudes the first in the recipe.
Deviations: none from the paper, which fine-tunes the models one after the other. mergekit does not have it.
Cost: one pass.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from merge.methods.parameters import Lambda
from merge.methods.registry import method

if TYPE_CHECKING:
    from torch import Tensor

EXAMPLE = """\
merge_method: magmax
base_model: org/base
models:
  - model: org/math
  - model: org/code
parameters:
  lambda: 0.5
dtype: bfloat16
"""


@method(
    inputs="deltas",
    locality="element",
    base="required",
    paper="Marczak et al. 2024, MagMax, arXiv:2407.06322",
    formula="y = b + lambda * the d_i of largest magnitude, element by element",
    example=EXAMPLE,
    reproducible="bitwise",
    fused="merge.kernels.voting:magmax",
)
def magmax(deltas: Tensor, *, lambda_: Lambda = 1.0) -> Tensor:
    """deltas (model, *shape) float32 -> merged task vector (*shape) float64"""
    import torch

    best = deltas[0]
    for delta in deltas[1:]:
        best = torch.where(delta.abs() > best.abs(), delta, best)
    return lambda_ * best.to(torch.float64)
