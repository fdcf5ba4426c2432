"""Consensus task arithmetic: the sum of task vectors, kept only where it matters to at least k tasks.

Paper: Wang et al. 2024, "Localizing task information for improved model merging" (arXiv:2405.07813), sections 4 and 5.
Formula: with d = sum_i w_i d_i and masks m_i = [|d_i| >= mask_lambda_i |d - d_i|],
    y = b + lambda * d [sum_i m_i >= k].
k = 2 drops what no task or only one needs ("catastrophic" and "selfish" weights).
Deviations: the paper chooses mask_lambda for each task from 0.2 to 0.6, and lambda, by validation; here they are given.
Cost: one pass.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

from merge.methods.parameters import Lambda
from merge.methods.registry import PerModel, Range, method

if TYPE_CHECKING:
    from torch import Tensor

EXAMPLE = """\
merge_method: consensus_ta
base_model: org/base
models:
  - model: org/math
    parameters: {mask_lambda: 0.4}
  - model: org/code
    parameters: {mask_lambda: 0.3}
  - model: org/law
parameters:
  k: 2
  lambda: 0.5
dtype: bfloat16
"""


@method(
    inputs="deltas",
    locality="element",
    base="required",
    paper="Wang et al. 2024, Localizing task information, arXiv:2405.07813",
    formula="y = b + lambda * sum_i w_i d_i, where |d_i| >= mask_lambda_i |sum - d_i| for at least k of the models",
    example=EXAMPLE,
    reproducible="bitwise",
    fused="merge.kernels.task_vectors:consensus_ta",
)
def consensus_ta(
    deltas: Tensor,
    *,
    weight: Annotated[PerModel[float], "weight of the task vector in the sum"] = 1.0,
    mask_lambda: Annotated[PerModel[float], Range(0.0), "how close to the sum an entry must be; less: more stay"] = 0.4,
    k: Annotated[int, Range(0), "how many models must agree"] = 2,
    lambda_: Lambda = 1.0,
) -> Tensor:
    """deltas (model, *shape) float32 -> merged task vector (*shape) float64"""
    import torch

    from merge.kernels.reference import weighted_sum

    total = weighted_sum(deltas, weight)
    limits = torch.tensor(mask_lambda, dtype=torch.float64, device=deltas.device).view(-1, *[1] * total.dim())
    masks = deltas.abs() >= limits * (total - deltas.to(torch.float64)).abs()
    return torch.where(masks.sum(0) >= k, lambda_ * total, 0.0)
