"""Slerp: spherical linear interpolation between two models.

Source: Shoemake 1985, "Animating rotation with quaternion curves", section 3.3; applied to the whole flattened tensor.
Formula: y = sin((1-t)a)/sin(a) x_0 + sin(t a)/sin(a) x_1, a the angle between x_0 (the base) and x_1.
Deviations: the tensors themselves are combined, not unit vectors, as in mergekit; |cos a| > 0.9995 falls back to
linear interpolation, as in mergekit; so does a tensor of norm zero (mergekit gives sin(pi/4) x at t = 0.5 there).
Cost: two passes; the first sums squares and products in float64.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

from merge.kernels.coefficients import slerp_coefficients
from merge.methods.registry import Range, method

if TYPE_CHECKING:
    from torch import Tensor

EXAMPLE = """\
merge_method: slerp
base_model: org/model-a
models:
  - model: org/model-a
  - model: org/model-b
parameters:
  t:
    - filter: self_attn
      value: [0, 0.5, 0.3, 0.7, 1]
    - filter: mlp
      value: [1, 0.5, 0.7, 0.3, 0]
    - value: 0.5
dtype: bfloat16
"""


@method(
    inputs="models",
    locality="tensor",
    base="required",
    base_is_input=True,
    paper="Shoemake 1985, Animating rotation with quaternion curves",
    formula="y = sin((1-t)a)/sin(a) x_0 + sin(t a)/sin(a) x_1",
    example=EXAMPLE,
    reproducible="bitwise",
    n_models=(2, 2),
    fused="merge.kernels.elementwise:slerp",
)
def slerp(
    models: Tensor, *, t: Annotated[float, Range(0.0, 1.0), "place between the base (0) and the other model (1)"]
) -> Tensor:
    """models (2, *shape) float32, the base first -> (*shape) float64"""
    import torch

    flat = models.reshape(2, -1).to(torch.float64)
    squares = (flat * flat).sum(dim=1)
    first, second = slerp_coefficients(float(squares[0]), float(squares[1]), float(flat[0] @ flat[1]), t)
    return (flat[0] * first + flat[1] * second).view(models.shape[1:])
