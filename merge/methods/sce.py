"""SCE: select the entries that vary most between models, weight the models by them, erase minority signs.

Paper: Wan et al. 2024, "FuseChat" (arXiv:2408.07990).
Formula: select: the floor(select_topk m) entries of largest variance over the models stay, m the number of entries
whose variance is not zero (all stay at select_topk = 1; of equal variances those of lowest flat index). Calculate:
w_i = mean(d_i^2) / sum_j mean(d_j^2) over what stays. Erase: with s = sign(sum_i d_i), zero counting as +,
    y = b + sum_i [sign(d_i) = s] w_i d_i / sum_i [sign(d_i) = s] w_i.
Variances are compared as standard deviations rounded to float32.
Deviations: mergekit weighs the models equally if the sum of their mean squares is below 1e-6, which is always so for
small fine-tunes; here only if all are zero.
Cost: two passes at select_topk = 1, the first for the squares; else two more to find the entries by histogram, and at
most one to place equal variances.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

from merge.kernels.costs import searched_values
from merge.methods.registry import Range, method

if TYPE_CHECKING:
    from torch import Tensor

EXAMPLE = """\
merge_method: sce
base_model: org/base
models:
  - model: org/math
  - model: org/code
  - model: org/chat
parameters:
  select_topk: 0.1
dtype: bfloat16
"""


@method(
    inputs="deltas",
    locality="tensor",
    base="required",
    paper="Wan et al. 2024, FuseChat, arXiv:2408.07990",
    formula="y = b + mean, by mean(d_i^2), of the most varying d_i that agree with sign(sum_i d_i)",
    example=EXAMPLE,
    reproducible="bitwise",
    fused="merge.kernels.voting:sce",
    scratch=searched_values(1),
)
def sce(
    deltas: Tensor,
    *,
    select_topk: Annotated[float, Range(0.0, 1.0), "share of the entries that differ that stays"] = 1.0,
) -> Tensor:
    """deltas (model, *shape) float32 -> merged task vector (*shape) float64"""
    import torch

    wide = deltas.to(torch.float64)
    if select_topk < 1:
        spread = deviation(wide).reshape(-1)
        order = torch.sort(spread, descending=True, stable=True).indices
        dropped = order[int(select_topk * int((spread > 0).sum())) :]
        wide = wide.reshape(len(deltas), -1).index_fill(1, dropped, 0.0).view(deltas.shape)
    squares = (wide * wide).reshape(len(wide), -1).sum(dim=1)
    total, positive = torch.zeros_like(wide[0]), sum(wide) >= 0
    weights = torch.zeros_like(total)
    for delta, weight in zip(wide, squares / squares.sum(), strict=True):
        agrees = ((delta > 0) == positive) & (delta != 0)
        total += torch.where(agrees, weight * delta, 0.0)
        weights += torch.where(agrees, weight, 0.0)
    return total / torch.where(weights == 0, 1.0, weights)


def deviation(deltas: Tensor) -> Tensor:
    """deltas (model, *shape) float64 -> population standard deviation over the models (*shape) float32"""
    import torch

    mean = torch.zeros_like(deltas[0])
    for delta in deltas:
        mean += delta
    mean /= len(deltas)
    squares = torch.zeros_like(mean)
    for delta in deltas:
        squares += (delta - mean) * (delta - mean)
    return torch.sqrt(squares / len(deltas)).to(torch.float32)
