"""Linear: the weighted average of models.

Paper: Wortsman et al. 2022, "Model soups" (arXiv:2203.05482), section 2.
Formula: y = sum_i w_i x_i / sum_i w_i; without `normalize`, y = sum_i w_i x_i.
Deviations: weights that sum to zero with `normalize` are an error at plan time, not NaN.
Cost: one pass, bound by the memory bus.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Annotated, Any

from merge.kernels.weights import factors_of_mean
from merge.methods.parameters import Normalize
from merge.methods.registry import OnFactors, PerModel, method

if TYPE_CHECKING:
    from torch import Tensor

EXAMPLE = """\
merge_method: linear
models:
  - model: org/model-a
    parameters: {weight: 0.6}
  - model: org/model-b
    parameters: {weight: 0.4}
dtype: bfloat16
"""


def _check(parameters: dict[str, Any]) -> str | None:
    if parameters.get("normalize", True) and abs(sum(parameters["weight"])) < 1e-8:
        return f"the weights {list(parameters['weight'])} sum to zero, and normalize divides by the sum."
    return None


@method(
    inputs="models",
    locality="element",
    base="optional",
    base_is_input=True,
    paper="Wortsman et al. 2022, Model soups, arXiv:2203.05482",
    formula="y = sum_i w_i x_i / sum_i w_i",
    example=EXAMPLE,
    reproducible="bitwise",
    check=_check,
    fused="merge.kernels.elementwise:linear",
    on_factors=OnFactors(factors_of_mean),
)
def linear(
    models: Tensor,
    *,
    weight: Annotated[PerModel[float], "weight of the model in the average"],
    normalize: Normalize = True,
) -> Tensor:
    """models (model, *shape) float32 -> (*shape) float64"""
    from merge.kernels.reference import weighted_sum
    from merge.kernels.weights import whole

    weights, scale = whole(weight)
    return weighted_sum(models, weights) * (1.0 / (math.fsum(weights) if normalize else scale))
