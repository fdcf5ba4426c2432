"""Arcee fusion: keep the changes over the base that matter most, by size and by their effect on a row's softmax.

Source: Arcee AI, Arcee Fusion; the method came with mergekit.
Formula: importance = |d| KL(p || q), p and q the softmax of x and of the base b over the last dimension, plus 1e-8;
    y = x where importance >= median + 1.5 (Q3 - Q1), else b; quantile(f) = sorted[floor(f (n - 1))] over the tensor.
    Importances are compared as float32.
Deviations: quantiles are exact (mergekit samples large tensors at random, without a seed). KL is summed in float64 as
p log(p/q) - p + q, the same sum with terms that are never negative: mergekit's float32 sum of p log(p/q) is mostly
rounding error for small d, so its masks differ.
Cost: one pass for the divergences of rows, one and a sample to find the quantiles by histogram, one to choose.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from merge.kernels.coefficients import FUSION_EPSILON, FUSION_SHARES, fusion_threshold
from merge.kernels.costs import searched_values
from merge.methods.registry import method

if TYPE_CHECKING:
    from torch import Tensor

EXAMPLE = """\
merge_method: arcee_fusion
base_model: org/model-a
models:
  - model: org/model-a
  - model: org/model-b
dtype: bfloat16
"""
_BLOCK = 1 << 18  # elements whose divergence is computed at once
SERIES = 1e-3  # |r| below which (1 + r) log(1 + r) - r is summed as a series


@method(
    inputs="models",
    locality="tensor",
    base="required",
    base_is_input=True,
    paper="Arcee AI, Arcee Fusion",
    formula="y = x where |d| KL(softmax x || softmax b) >= median + 1.5 (Q3 - Q1), else b",
    example=EXAMPLE,
    reproducible="bitwise",
    fused="merge.kernels.fusion:arcee_fusion",
    scratch=searched_values(3),
    n_models=(2, 2),
)
def arcee_fusion(models: Tensor) -> Tensor:
    """models (2, *shape) float32, the base first -> (*shape) float32"""
    import torch

    base, other = models
    if not base.numel():
        return base
    size = importance(other, base)
    ordered = size.reshape(-1).sort().values
    quartiles = (float(ordered[int(share * (len(ordered) - 1))]) for share in FUSION_SHARES)
    return torch.where(size.to(torch.float64) >= fusion_threshold(*quartiles), other, base)


def importance(x: Tensor, b: Tensor) -> Tensor:
    """|x - b| times the divergence of its row, (*shape) float32; some rows at a time, for they take much memory"""
    import torch

    size = torch.zeros(x.shape, dtype=torch.float32, device=x.device)
    width = x.shape[-1] if x.dim() else 1
    if width > 1:
        rows, rows_x, rows_b = (tensor.view(-1, width) for tensor in (size, x, b))
        n = max(1, _BLOCK // width)
        for start in range(0, len(rows), n):
            part, base = (tensor[start : start + n].to(torch.float64) for tensor in (rows_x, rows_b))
            rows[start : start + n] = (part - base).abs() * divergence(part, base)  # rounded here
    return size


def divergence(wide: Tensor, base: Tensor) -> Tensor:
    """float64 (*shape) twice -> KL of the softmax over the last dimension (*shape[:-1], 1), exact if it is small too"""
    import torch

    change = wide - base
    before = torch.softmax(base, dim=-1)
    small = change.abs().amax(dim=-1, keepdim=True) < 1
    shift = torch.log1p((before * torch.expm1(change.clamp(-1, 1))).sum(dim=-1, keepdim=True))
    shift = torch.where(small, shift, wide.logsumexp(dim=-1, keepdim=True) - base.logsumexp(dim=-1, keepdim=True))
    gained = torch.where(small, before * torch.expm1(change - shift), torch.softmax(wide, dim=-1) - before)
    q = before + FUSION_EPSILON
    r = gained / q
    series = r * r * (0.5 - r * (1 / 6 - r * (1 / 12 - r / 20)))
    exact = (1 + r) * torch.log1p(r) - r
    return (q * torch.where(r.abs() < SERIES, series, exact)).sum(dim=-1, keepdim=True)
