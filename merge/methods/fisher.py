"""Fisher merging: average the models, weighting each entry by its Fisher information.

Paper: Matena and Raffel 2022, "Merging Models with Fisher-Weighted Averaging" (arXiv:2111.09832).
Formula: y = sum_i w_i F_i x_i / sum_i w_i F_i, with F_i the diagonal Fisher information, at least `epsilon`.
Deviations: `merge statistics` takes gradients at the text's own next tokens (empirical Fisher); the paper samples them.
Cost: one pass over models and statistics.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

from merge.methods.registry import PerModel, Range, method

if TYPE_CHECKING:
    from torch import Tensor

EXAMPLE = """\
merge_method: fisher
models:
  - model: org/run-1
    statistics: run-1.safetensors
  - model: org/run-2
    statistics: run-2.safetensors
    parameters: {weight: 0.5}
parameters:
  weight: 1
dtype: bfloat16
"""


def _check(parameters: dict[str, Any]) -> str | None:
    if not any(parameters["weight"]):
        return "all weights are zero, and their sum divides."
    return None


@method(
    inputs="models",
    locality="element",
    paper="Matena and Raffel 2022, Fisher-weighted averaging, arXiv:2111.09832",
    formula="y = sum_i w_i F_i x_i / sum_i w_i F_i",
    example=EXAMPLE,
    reproducible="bitwise",
    check=_check,
    statistics="fisher",
)
def fisher(
    models: Tensor,
    *,
    weight: Annotated[PerModel[float], Range(0), "weight of the model beside its Fisher information"] = 1.0,
    epsilon: Annotated[float, Range(1e-30), "least Fisher information of an entry"] = 1e-6,
    _statistics: tuple[Tensor, ...] = (),
) -> Tensor:
    """models (model, *shape) float32, Fisher information (*shape) float32 for each -> (*shape) float64"""
    import torch

    total = torch.zeros(models.shape[1:], dtype=torch.float64, device=models.device)
    weighted = torch.zeros_like(total)
    information = _statistics or tuple(torch.ones_like(values) for values in models)
    for values, own, scale in zip(models, information, weight, strict=True):
        precision = own.to(torch.float64).clamp(min=epsilon) * scale
        total += precision
        weighted += precision * values
    return weighted / total
