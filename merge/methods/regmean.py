"""RegMean: the linear layer whose outputs are closest to those of all models, each on its own data.

Paper: Jin et al. 2023, "Dataless Knowledge Fusion by Merging Weights of Language Models" (arXiv:2212.09849).
Formula: with W_i (out, in) and the Gram matrix G_i = X_i^T X_i (in, in) of the layer's inputs,
    W = (sum_i W_i G'_i) (sum_i G'_i)^-1,  G'_i = alpha G_i + (1 - alpha) diag(G_i).
Tensors without a Gram matrix (embeddings, norms, biases) are averaged. Grams are sums over tokens, as in the paper: a
model whose statistics saw twice the text counts twice.
Deviations: solved as a correction of the plain mean, in float64; directions that no input excites keep the mean, while
the paper's inverse does not exist there. A singular system is solved by the pseudo-inverse.
Cost: a Cholesky factor of (in, in) for each linear layer.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

from merge.methods.registry import Cost, Range, method

if TYPE_CHECKING:
    from torch import Tensor

EXAMPLE = """\
merge_method: regmean
models:
  - model: org/run-1
    statistics: run-1.safetensors
  - model: org/run-2
    statistics: run-2.safetensors
parameters:
  alpha: 0.9
dtype: bfloat16
"""


@method(
    inputs="models",
    locality="tensor",
    paper="Jin et al. 2023, Dataless Knowledge Fusion (RegMean), arXiv:2212.09849",
    formula="W = (sum_i W_i G'_i)(sum_i G'_i)^-1, G'_i = alpha X_i^T X_i + (1 - alpha) diag(X_i^T X_i)",
    example=EXAMPLE,
    statistics="gram",
    cost=Cost(seconds=6, seconds_each=4.5, elements=4, elements_each=0, squares=0, side="columns"),
)
def regmean(
    models: Tensor,
    *,
    alpha: Annotated[float, Range(0, 1), "scale of the Gram matrices' entries off the diagonal"] = 0.9,
    _statistics: tuple[Tensor, ...] = (),
) -> Tensor:
    """models (model, out, in) float32, a Gram (in, in) float32 for each -> (out, in) float64"""
    import torch

    mean = models.mean(dim=0, dtype=torch.float64)
    if not _statistics or not models.numel():
        return mean
    total = torch.zeros(_statistics[0].shape, dtype=torch.float64, device=models.device)
    wanted = torch.zeros_like(mean)
    for weights, gram in zip(models, _statistics, strict=True):
        scaled = gram.to(torch.float64) * alpha
        scaled.diagonal().copy_(gram.diagonal())
        total += scaled
        wanted += (weights.to(torch.float64) - mean) @ scaled
    diagonal = total.diagonal()
    diagonal[diagonal == 0] = 1.0  # an input that is always zero: its row of `wanted` is zero, and the mean stays
    factor, failed = torch.linalg.cholesky_ex(total)
    if failed:
        return mean + wanted @ torch.linalg.pinv(total, hermitian=True)
    return mean + torch.cholesky_solve(wanted.mT, factor).mT
