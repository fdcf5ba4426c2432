"""Nearswap: move the base towards another model, fully where the two are close and less where they are far apart.

Source: alchemonaut's QuartetAnemoi-70B-t0.0001 model card; the method came with mergekit.
Formula: w = clamp(t / max(|a - b|, 1e-6), 0, 1), y = w b + (1 - w) a, a the base: no entry moves by more than t.
Deviations: none from mergekit.
Cost: one pass.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

from merge.kernels.coefficients import NEARSWAP_LEAST
from merge.methods.registry import Range, method

if TYPE_CHECKING:
    from torch import Tensor

EXAMPLE = """\
merge_method: nearswap
base_model: org/model-a
models:
  - model: org/model-a
  - model: org/model-b
parameters:
  t: 0.0001
dtype: bfloat16
"""


@method(
    inputs="models",
    locality="element",
    base="required",
    base_is_input=True,
    paper="alchemonaut, QuartetAnemoi-70B-t0.0001",
    formula="y = w b + (1 - w) a, w = clamp(t/|a - b|, 0, 1), a the base",
    example=EXAMPLE,
    reproducible="bitwise",
    n_models=(2, 2),
    fused="merge.kernels.voting:nearswap",
)
def nearswap(
    models: Tensor, *, t: Annotated[float, Range(0.0), "distance an entry of the base moves at most"]
) -> Tensor:
    """models (2, *shape) float32, the base first -> (*shape) float64"""
    import torch

    base, other = models.to(torch.float64)
    share = (t / (base - other).abs().clamp(min=NEARSWAP_LEAST)).clamp(max=1.0)
    return share * other + (1 - share) * base
