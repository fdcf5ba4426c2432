"""PCB: parameters of all models compete, and the strongest are averaged, weighted by their strength.

Paper: Du et al. 2024, "Parameter competition balancing for model merging" (arXiv:2410.02396), section 3.
Formula: with N models, norm = to [0, 1] by minimum and maximum, and a_i = |d_i| limited to its middle 99.98 %,
    strength_i = exp(N norm(a_i)^2) tanh(d_i sum_j d_j),
    beta_i = norm of strength_i, raised to its (1 - density) quantile,
    y = b + lambda * sum_i w_i beta_i sign(d_i) a_i / sum_i beta_i.
Deviations: activations and outliers follow the paper's released program; its text has softmax for both. Norms and
quantiles are those of each tensor; the paper takes them over the whole task vector. If all strengths of a tensor are
equal, beta is 1 (0 if they are 0). There is no kernel: the torch definition runs on a whole tensor at a time.
Cost: two sorts for each model.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

from merge.methods.parameters import Factor, Lambda
from merge.methods.registry import Range, method

if TYPE_CHECKING:
    from torch import Tensor

EXAMPLE = """\
merge_method: pcb
base_model: org/base
models:
  - model: org/math
  - model: org/code
    parameters: {weight: 0.8}
parameters:
  density: 0.1
  lambda: 1.2
dtype: bfloat16
"""
_OUTLIERS = 1e-4


@method(
    inputs="deltas",
    locality="tensor",
    base="required",
    paper="Du et al. 2024, Parameter competition balancing, arXiv:2410.02396",
    formula="y = b + lambda * sum_i w_i beta_i d_i / sum_i beta_i, beta_i the strength of an entry in its competition",
    example=EXAMPLE,
    reproducible="bitwise",
)
def pcb(
    deltas: Tensor,
    *,
    weight: Factor = 1.0,
    density: Annotated[float, Range(0.0, 1.0), "share of entries that compete"] = 0.1,
    lambda_: Lambda = 1.0,
) -> Tensor:
    """deltas (model, *shape) float32 -> merged task vector (*shape) float64"""
    import torch

    from merge.kernels.reference import weighted_sum

    merged = torch.zeros(deltas.shape[1:], dtype=torch.float64, device=deltas.device)
    if merged.numel() == 0:
        return merged
    everything = weighted_sum(deltas, (1.0,) * len(deltas))
    strengths = torch.zeros_like(merged)
    for delta, w in zip(deltas.to(torch.float64), weight, strict=True):
        size = _limited(delta.abs(), _OUTLIERS, 1 - _OUTLIERS)
        share = _normed(size)
        strength = _each("exp", len(deltas) * share * share) * _each("tanh", delta * everything)
        beta = _normed(_limited(strength, 1 - density, 1.0))
        merged += w * beta * delta.sign() * size
        strengths += beta
    return lambda_ * merged / strengths.clamp(min=1e-12)


def _each(function: str, values: Tensor) -> Tensor:
    """exp or tanh, in place on the CPU; torch's own differ in their last bits with the processor."""
    import torch

    if values.device.type != "cpu":
        return torch.exp(values) if function == "exp" else torch.tanh(values)
    from merge.kernels import functions

    kernels = {"exp": functions.exp_all, "tanh": functions.tanh_all}
    kernels[function](values.view(-1).numpy())
    return values


def _limited(values: Tensor, low: float, high: float) -> Tensor:
    """Clamped to the quantiles low and high, both of them entries."""
    n = values.numel()
    ordered = values.reshape(-1).sort().values
    least = ordered[min(int(n * low), n - 1)]
    return values.clamp(least, ordered[max(int(n * high) - 1, 0)].clamp(min=least))


def _normed(values: Tensor) -> Tensor:
    """To [0, 1]; equal values to 1, or to 0 if they are 0."""
    least, most = values.min(), values.max()
    if least == most:
        return (values != 0).to(values.dtype)
    return (values - least) / (most - least)
