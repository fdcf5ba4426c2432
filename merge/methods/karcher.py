"""Karcher: the Riemannian mean of the models' directions on the sphere, at their mean length.

Source: Karcher 1977, "Riemannian center of mass and mollifier smoothing"; the method came with mergekit.
Formula: u_i = x_i/|x_i|, m = the normalised sum of w_i u_i; repeat, at most max_iter times or until |v| < tol:
    v = sum_i w_i log_m(u_i), m <- exp_m(v);  y = (sum_i w_i |x_i|) m,  weights scaled to sum to one.
m and v are sums of the inputs at any time, so the iteration is on their coefficients, in float64, and needs the
inputs' Gram matrix only: one pass for it and one to combine, however many iterations.
Deviations: `weight`, equal by default, which mergekit does not have. Inputs of norm <= tol count neither for direction
nor for length, as in mergekit; if all are, the result is their weighted mean instead of zero. If the sum of the
directions cancels, the iteration starts from the first input.
Cost: two passes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated

from merge.kernels.coefficients import KARCHER_TINY
from merge.methods.registry import PerModel, Range, method

if TYPE_CHECKING:
    from torch import Tensor

EXAMPLE = """\
merge_method: karcher
models:
  - model: org/model-a
  - model: org/model-b
  - model: org/model-c
parameters:
  max_iter: 20
  tol: 1.0e-7
dtype: bfloat16
"""


def _check(parameters: dict[str, object]) -> str | None:
    weight = parameters.get("weight") or (1.0,)
    weights = weight if isinstance(weight, Sequence) else (weight,)
    if min(weights) < 0 or sum(weights) <= 0:
        return f"the weights {list(weights)} have no mean: none may be negative, and not all zero."
    return None


@method(
    inputs="models",
    locality="tensor",
    base="optional",
    base_is_input=True,
    paper="Karcher 1977, Riemannian center of mass and mollifier smoothing",
    formula="y = sum_i w_i |x_i| times the m for which sum_i w_i log_m(x_i/|x_i|) = 0",
    example=EXAMPLE,
    reproducible="bitwise",
    check=_check,
    fused="merge.kernels.spherical:karcher",
)
def karcher(
    models: Tensor,
    *,
    weight: Annotated[PerModel[float], "weight of the model in the mean"] = 1.0,
    max_iter: Annotated[int, Range(0), "most iterations"] = 10,
    tol: Annotated[float, Range(0.0), "step at which to stop, and norm of a tensor that counts as zero"] = 1e-5,
) -> Tensor:
    """models (model, *shape) float32 -> (*shape) float64"""
    import torch

    flat = models.to(torch.float64).reshape(len(models), -1)
    lengths = [float(torch.linalg.vector_norm(row)) for row in flat]
    used = [i for i, length in enumerate(lengths) if length > tol and weight[i] > 0]
    if not used:
        shares = torch.tensor(weight, dtype=torch.float64, device=flat.device)
        return (shares @ flat / shares.sum()).view(models.shape[1:])
    shares = torch.tensor([weight[i] for i in used], dtype=torch.float64, device=flat.device)
    shares = shares / shares.sum()
    units = torch.stack([flat[i] / lengths[i] for i in used])
    mean = shares @ units
    mean = units[0] if torch.linalg.vector_norm(mean) < KARCHER_TINY else mean / torch.linalg.vector_norm(mean)
    for _ in range(max_iter):
        cosines = (units @ mean).clamp(-1, 1)
        angles = torch.acos(cosines)
        towards = shares * torch.where(angles < KARCHER_TINY, 1.0, angles / torch.sin(angles))
        towards = torch.where(math.pi - angles < KARCHER_TINY, 0.0, towards)  # opposite: no direction is the nearest
        step = towards @ units - (towards @ cosines) * mean
        length = torch.linalg.vector_norm(step)
        if length < max(tol, KARCHER_TINY):
            break
        mean = torch.cos(length) * mean + torch.sin(length) * step / length
        mean = mean / torch.linalg.vector_norm(mean)
    scale = sum(float(share) * lengths[i] for share, i in zip(shares, used, strict=True))
    return (scale * mean).view(models.shape[1:])
