"""Passthrough: copy one model's tensors unchanged; used for layer stacks and frankenmerges.

Formula: y = x, or y = scale * x. Without `scale` and with the same dtype the bytes are copied, never decoded.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

from merge.methods.registry import PerModel, method

if TYPE_CHECKING:
    from torch import Tensor

EXAMPLE = """\
merge_method: passthrough
slices:
  - sources: [{model: org/model-a, layer_range: [0, 24]}]
  - sources: [{model: org/model-a, layer_range: [8, 32]}]
dtype: bfloat16
"""


@method(
    inputs="models",
    locality="element",
    formula="y = x, or scale * x",
    example=EXAMPLE,
    reproducible="bitwise",
    n_models=(1, 1),
    fused="merge.kernels.elementwise:passthrough",
)
def passthrough(
    models: Tensor,
    *,
    scale: Annotated[PerModel[float], "factor for the tensor; none: the bytes are copied"] = None,
) -> Tensor:
    """models (1, *shape) float32 -> (*shape) float32"""
    if scale is None or scale[0] is None:
        return models[0]
    return models[0] * scale[0]
