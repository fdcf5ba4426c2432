"""NuSlerp: slerp between two models with a weight each, or between their task vectors.

Source: Shoemake 1985, "Animating rotation with quaternion curves", section 3.3; weights and variants are mergekit's.
Formula: t = w_2 / (w_1 + w_2) (0.5 where the sum is next to nothing), a the angle between v_1 and v_2,
    y = sin((1-t)a)/sin(a) v_1 + sin(t a)/sin(a) v_2,
where v_i is x_i, or x_i - b with a base, which is then added.
The vectors are whole tensors; without `nuslerp_flatten` they are the rows (last dimension), and with
`nuslerp_row_wise` the columns (first dimension; the name is mergekit's). Of a vector or scalar all three are the same.
Deviations: no limit of 0.9995; linear only if the directions are equal or opposite up to rounding, as in mergekit, and
if one of them has length zero (mergekit gives sin((1-t) pi/2) v_1 there).
Cost: one pass by rows; two for whole tensors and columns, the first for sums in float64.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

from merge.kernels.coefficients import NUSLERP_COLINEAR, nuslerp_place
from merge.methods.registry import PerModel, method

if TYPE_CHECKING:
    from torch import Tensor

EXAMPLE = """\
merge_method: nuslerp
base_model: org/base  # optional: without it the models themselves are interpolated
models:
  - model: org/math
    parameters: {weight: 0.4}
  - model: org/code
    parameters: {weight: 0.6}
dtype: bfloat16
"""


@method(
    inputs="either",
    locality="tensor",
    base="optional",
    paper="Shoemake 1985, Animating rotation with quaternion curves",
    formula="y = sin((1-t)a)/sin(a) v_1 + sin(t a)/sin(a) v_2, t = w_2/(w_1 + w_2)",
    example=EXAMPLE,
    reproducible="bitwise",
    n_models=(2, 2),
    fused="merge.kernels.spherical:nuslerp",
)
def nuslerp(
    tensors: Tensor,
    *,
    weight: Annotated[PerModel[float], "weight of the model; only their ratio counts"],
    nuslerp_flatten: Annotated[bool, "one vector for the whole tensor"] = True,
    nuslerp_row_wise: Annotated[bool, "without flatten: along the first dimension, not the last"] = False,
) -> Tensor:
    """tensors (2, *shape) float32, models or task vectors -> (*shape) float64"""
    import torch

    shape = tensors.shape[1:]
    first, second = tensors.to(torch.float64)
    if nuslerp_flatten or len(shape) < 2:
        first, second = first.reshape(-1), second.reshape(-1)
    along = 0 if nuslerp_row_wise or first.dim() == 1 else -1
    t = nuslerp_place(weight)
    lengths = [torch.linalg.vector_norm(vector, dim=along, keepdim=True) for vector in (first, second)]
    product = lengths[0] * lengths[1]
    cosine = ((first * second).sum(dim=along, keepdim=True) / product).clamp(-1, 1)
    angle = torch.acos(cosine)
    linear = (product == 0) | (torch.sin(angle) < NUSLERP_COLINEAR)
    factors = [torch.where(linear, s, torch.sin(s * angle) / torch.sin(angle)) for s in (1 - t, t)]
    return (factors[0] * first + factors[1] * second).view(shape)
