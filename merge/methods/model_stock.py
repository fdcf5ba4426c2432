"""Model stock: the mean of the fine-tunes, moved towards the base the more their directions differ.

Paper: Jang et al. 2024, "Model Stock" (arXiv:2403.19522).
Formula: with c the mean cosine over pairs of task vectors d_i = x_i - b, and N of them,
    t = N c / (1 + (N - 1) c),  y = t mean(x_i) + (1 - t) b.
One t for each tensor, as in the paper; `filter_wise`: one for each row (last dimension; a vector is one row).
Deviations: t is clamped to [0, 1] (not with `clamp: false`): for c < 0, when task vectors point away from each other,
the result is the base; mergekit's t is negative there and grows without bound towards c = -1/(N-1). The cosine with a
zero task vector counts as 0, and so does t if its divisor is 0.
Cost: two passes, the first for the Gram matrix of the task vectors in float64; one with `filter_wise`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

from merge.methods.registry import method

if TYPE_CHECKING:
    from torch import Tensor

EXAMPLE = """\
merge_method: model_stock
base_model: org/base
models:
  - model: org/run-1
  - model: org/run-2
  - model: org/run-3
parameters:
  filter_wise: false
dtype: bfloat16
"""


@method(
    inputs="deltas",
    locality="tensor",
    base="required",
    paper="Jang et al. 2024, Model Stock, arXiv:2403.19522",
    formula="y = b + t mean(d_i), t = N c/(1 + (N-1) c), c the mean cosine of pairs",
    example=EXAMPLE,
    reproducible="bitwise",
    n_models=(2, None),
    fused="merge.kernels.spherical:model_stock",
)
def model_stock(
    deltas: Tensor,
    *,
    filter_wise: Annotated[bool, "a ratio for each row, not for each tensor"] = False,
    clamp: Annotated[bool, "clamp the ratio to [0, 1]"] = True,
) -> Tensor:
    """deltas (model, *shape) float32 -> merged task vector (*shape) float64"""
    import torch

    shape = deltas.shape[1:]
    n = len(deltas)
    by_row = filter_wise and len(shape) > 1
    vectors = deltas.to(torch.float64).reshape(n, *((-1, shape[-1]) if by_row and shape[-1] else (1, -1)))
    lengths = torch.linalg.vector_norm(vectors, dim=-1)
    cosines = torch.zeros_like(lengths[0])
    for i in range(n):
        for j in range(i + 1, n):
            product = lengths[i] * lengths[j]
            cosine = (vectors[i] * vectors[j]).sum(dim=-1) / product
            cosines += torch.where(product > 0, cosine, 0.0)
    mean = cosines / (n * (n - 1) / 2)
    divisor = 1 + (n - 1) * mean
    ratio = torch.where(divisor != 0, n * mean / divisor, 0.0)
    if clamp:
        ratio = ratio.clamp(0, 1)
    return (ratio.unsqueeze(-1) * vectors.mean(dim=0)).view(shape)
