"""Multislerp: the weighted mean direction of any number of models, or of their task vectors, at their mean length.

Source: Goddard 2024, "Multi-SLERP" (goddard.blog); the method came with mergekit.
Formula: u_i = v_i / (|v_i| + eps), s = sum_i w_i u_i, m = s / |s|,
    y = cos|r| m + sin|r| r/|r| times sum_i w_i |v_i|,  r = sum_i w_i (u_i - (u_i . m) m),
where v_i is x_i, or x_i - b with a base, which is then added. The tangents are projections, not the log map of a
sphere, so that r = s - (s . m) m is zero whatever the weights: y = (sum_i w_i |v_i|) m, which is what is computed.
For the mean on the sphere see karcher.
Deviations: if directions cancel (|s| near zero), the result is the weighted sum for two inputs and an error for more,
as in mergekit. Tensors that are all zero give zero instead of that error, inputs far shorter than eps keep their
direction, and a single input is returned unchanged.
Cost: two passes; the first sums the inputs' Gram matrix in float64. Nearly opposite directions take a third.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

from merge.kernels.coefficients import multislerp_factors
from merge.methods.parameters import Normalize
from merge.methods.registry import PerModel, Range, method

if TYPE_CHECKING:
    from torch import Tensor

EXAMPLE = """\
merge_method: multislerp
base_model: org/base  # optional: without it the models themselves are merged
models:
  - model: org/math
    parameters: {weight: 0.5}
  - model: org/code
    parameters: {weight: 0.3}
  - model: org/chat
    parameters: {weight: 0.2}
dtype: bfloat16
"""


def _check(parameters: dict[str, Any]) -> str | None:
    if parameters.get("normalize_weights", True) and abs(sum(parameters["weight"])) < 1e-8:
        return f"the weights {list(parameters['weight'])} sum to zero, and normalize_weights divides by the sum."
    return None


@method(
    inputs="either",
    locality="tensor",
    base="optional",
    paper="Goddard 2024, Multi-SLERP, goddard.blog",
    formula="y = sum_i w_i |v_i| times the direction of sum_i w_i v_i/|v_i|",
    example=EXAMPLE,
    reproducible="bitwise",
    check=_check,
    fused="merge.kernels.spherical:multislerp",
)
def multislerp(
    tensors: Tensor,
    *,
    weight: Annotated[PerModel[float], "weight of the direction and of the length"],
    normalize_weights: Normalize = True,
    eps: Annotated[float, Range(0.0), "added to lengths; a sum of directions shorter than this has none"] = 1e-8,
) -> Tensor:
    """tensors (model, *shape) float32, models or task vectors -> (*shape) float64"""
    import torch

    vectors = tensors.to(torch.float64).reshape(len(tensors), -1)

    def combined(coefficients: tuple[float, ...]) -> Tensor:
        return torch.tensor(coefficients, dtype=torch.float64, device=vectors.device) @ vectors

    lengths = [float(torch.linalg.vector_norm(vector)) for vector in vectors]
    found = multislerp_factors(
        lengths, weight, normalize_weights, eps, lambda c: float(torch.linalg.vector_norm(combined(c)))
    )
    return combined(found).view(tensors.shape[1:])
