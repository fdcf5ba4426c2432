"""Task arithmetic: add and subtract task vectors.

Paper: Ilharco et al. 2023, "Editing models with task arithmetic" (arXiv:2212.04089), section 2.
Formula: y = b + lambda * sum_i w_i (x_i - b); a negative weight subtracts (unlearns) a task.
With `normalize` the sum is divided by sum_i w_i.
Cost: one pass.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

from merge.kernels.weights import factors_of_sum
from merge.methods.parameters import Lambda, Normalize
from merge.methods.registry import OnFactors, PerModel, Range, method

if TYPE_CHECKING:
    from torch import Tensor

EXAMPLE = """\
merge_method: task_arithmetic
base_model: org/base
models:
  - model: org/helpful
    parameters: {weight: 1.0}
  - model: org/toxic
    parameters: {weight: -0.5}
dtype: bfloat16
"""


@method(
    inputs="deltas",
    locality="element",
    base="required",
    paper="Ilharco et al. 2023, Editing models with task arithmetic, arXiv:2212.04089",
    formula="y = b + lambda * sum_i w_i d_i",
    example=EXAMPLE,
    reproducible="bitwise",
    fused="merge.kernels.task_vectors:task_arithmetic",
    on_factors=OnFactors(factors_of_sum),
)
def task_arithmetic(
    deltas: Tensor,
    *,
    weight: Annotated[PerModel[float], "factor of the task vector; negative subtracts it"],
    normalize: Normalize = False,
    lambda_: Lambda = 1.0,
    density: Annotated[PerModel[float], Range(0.0, 1.0), "accepted for old recipes; no effect here"] = 1.0,
) -> Tensor:
    """deltas (model, *shape) float32 -> merged task vector (*shape) float64"""
    from merge.kernels.reference import weighted_sum
    from merge.kernels.weights import divisor

    return lambda_ / divisor(weight, normalize) * weighted_sum(deltas, weight)
