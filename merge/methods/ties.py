"""TIES: trim each task vector to its largest entries, elect a sign for each entry, average what agrees with it.

Paper: Yadav et al. 2023, "TIES-Merging" (arXiv:2306.01708), section 4, algorithm 1.
Formula: with m_i the trimmed d_i and s = sign(sum_i w_i m_i), zero counting as +,
    y = b + lambda * sum_i [sign(w_i m_i) = s] w_i m_i / sum_i [sign(w_i m_i) = s] w_i.
Trim keeps exactly k = max(1, floor(density n)) entries of largest magnitude; of equal magnitudes those of lowest flat
index stay.
Deviations: the paper trims over the whole task vector (`trim: model`); the default is a threshold for each tensor, as
in mergekit. mergekit trims equal magnitudes in arbitrary order.
Variants: `divide_by: count` divides by the number of entries that agree (PEFT), `merge_func: sum` not at all (the
disjoint sum of FusionBench), `consensus: count` elects the sign that more entries have. Votes are weighted here; PEFT
and FusionBench elect without weights, which is the same with equal ones.
Cost: one pass to find the k-th magnitudes by histogram (no sort), at most one to place ties, one to combine.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal

from merge.kernels.costs import trimming
from merge.methods.parameters import Consensus, DivideBy, Lambda, MergeFunc, NormalizeAgreeing
from merge.methods.registry import ModelPass, PerModel, Range, method

if TYPE_CHECKING:
    from torch import Tensor

    from merge.kernels.selection import Threshold

EXAMPLE = """\
merge_method: ties
base_model: org/base
models:
  - model: org/math
    parameters: {weight: 0.5, density: 0.5}
  - model: org/code
    parameters: {weight: 0.5, density: [1, 0.7, 0.1]}  # a gradient over the layers
parameters:
  normalize: true
dtype: bfloat16
"""


@method(
    inputs="deltas",
    locality="tensor",
    base="required",
    paper="Yadav et al. 2023, TIES-Merging, arXiv:2306.01708",
    formula="y = b + lambda * mean of the trimmed w_i d_i that agree with the elected sign",
    example=EXAMPLE,
    reproducible="bitwise",
    fused="merge.kernels.task_vectors:ties",
    scratch=trimming,
    model_pass=ModelPass("merge.engine.model_trim:thresholds", "trim", "model", uniform="density"),
)
def ties(
    deltas: Tensor,
    *,
    weight: Annotated[PerModel[float], "weight of the task vector in election and mean"],
    density: Annotated[PerModel[float], Range(0.0, 1.0), "share of entries kept, the largest"] = 1.0,
    normalize: NormalizeAgreeing = True,
    lambda_: Lambda = 1.0,
    rescale: Annotated[Literal[False, True, "l1"], "restore the L1 norm of the task vector"] = False,
    trim: Annotated[Literal["tensor", "model"], "threshold over each tensor, or over the model (paper)"] = "tensor",
    consensus: Consensus = "sum",
    divide_by: DivideBy = "weights",
    merge_func: MergeFunc = "normalize",
    _threshold: tuple[Threshold, ...] | None = None,
) -> Tensor:
    """deltas (model, *shape) float32 -> merged task vector (*shape) float64"""
    import torch

    from merge.kernels.reference import elect_and_sum, keep_above, keep_largest, l1_factors
    from merge.kernels.weights import election

    if trim == "model":
        assert _threshold is not None
        kept = torch.stack([keep_above(d, limit) for d, limit in zip(deltas, _threshold, strict=True)])
    else:
        kept = torch.stack([keep_largest(d, share) for d, share in zip(deltas, density, strict=True)])
    factors = l1_factors(weight, deltas, kept) if rescale else weight
    return elect_and_sum(kept, election(weight, factors, normalize, lambda_, consensus, divide_by, merge_func))
