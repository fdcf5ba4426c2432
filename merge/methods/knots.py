"""KnOTS: express all adapters in one basis by a joint SVD, and merge them there by another method.

Paper: Stoica et al. 2024, "Model merging with SVD to tie the knots" (arXiv:2410.19735), section 4.
Formula: with [d_1 .. d_n] = U S [V_1^T .. V_n^T] over the changes d_i = s_i B_i A_i of the adapters side by side,
    B A = U S V^T, V^T = M(V_1^T, .., V_n^T),
and M the `inner` method with these weights and densities; TIES by default, as in KnOTS-TIES.
U and S are those of all adapters, so the result has at most the sum of their ranks, and nothing is cut off unless a
`rank` is given. For adapters only.
Deviations: none known; directions whose singular value is rounding noise are left out.
Cost: a QR decomposition of the B_i side by side, and an SVD of (sum of ranks, n times in).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Literal

from merge.methods.registry import OnFactors, PerModel, Range, known_method, method

if TYPE_CHECKING:
    from torch import Tensor

    from merge.kernels.low_rank import Factors, LowRank

EXAMPLE = """\
merge_method: knots
models:
  - model: org/math-lora
  - model: org/code-lora
    parameters: {weight: 0.8}
parameters:
  density: 0.3
"""


def _elements(rows: int, columns: int, ranks: int, n_adapters: int) -> int:
    return 4 * ranks * (rows + columns) + ranks * columns * (5 * n_adapters + 3)


@method(
    inputs="adapters",
    locality="tensor",
    base="optional",
    paper="Stoica et al. 2024, Model merging with SVD to tie the knots, arXiv:2410.19735",
    formula="B A = U S M(V_1^T, .., V_n^T), [d_1 .. d_n] = U S [V_1^T .. V_n^T], M another method",
    example=EXAMPLE,
    random=True,
    on_factors=OnFactors(compute="merge.methods.knots:on_factors", elements=_elements),
)
def knots(
    deltas: Tensor,
    *,
    weight: Annotated[PerModel[float], "weight of the adapter in the inner method"] = 1.0,
    density: Annotated[PerModel[float], Range(0.0, 1.0), "share of entries kept by the inner method"] = 1.0,
    inner: Annotated[Literal["ties", "task_arithmetic", "dare_ties", "dare_linear"], "what merges the V_i"] = "ties",
    normalize: Annotated[bool, "divide by the weights, as the inner method does it"] = True,
    lambda_: Annotated[float, "factor of the result"] = 1.0,
    _keys: tuple[int, ...] = (),
) -> Tensor:
    """deltas (adapter, out, in) float32 -> merged change (out, in) float64; _keys: one 64-bit key for each adapter"""
    import torch

    from merge.kernels.spectral import thin_svd

    rows, columns = deltas.shape[1:]
    u, s, v = thin_svd(deltas.to(torch.float64).permute(1, 0, 2).reshape(rows, -1))
    aligned = v.T.reshape(len(s), len(deltas), columns).transpose(0, 1)
    return (u * s) @ _merged(aligned, inner, weight, density, normalize, lambda_, _keys)


def on_factors(
    parts: Sequence[Factors],
    rank: int,
    *,
    weight: tuple[float, ...],
    density: tuple[float, ...],
    inner: str,
    normalize: bool,
    lambda_: float,
    _keys: tuple[int, ...],
) -> LowRank:
    """The same of the adapters' factors, at a rank."""
    from merge.kernels.low_rank import common_basis, nearest_product

    basis, aligned = common_basis(parts)
    return nearest_product(_merged(aligned, inner, weight, density, normalize, lambda_, _keys), basis, rank)


def _merged(
    aligned: Tensor,
    inner: str,
    weight: tuple[float, ...],
    density: tuple[float, ...],
    normalize: bool,
    lambda_: float,
    keys: tuple[int, ...],
) -> Tensor:
    """The V_i^T (adapter, rank, in) -> M of them (rank, in) float64"""
    import torch

    chosen = known_method(inner)
    if aligned.shape[1] == 0:
        return aligned.new_zeros(aligned.shape[1:], dtype=torch.float64)
    more = {"_keys": keys} if chosen.random else {}
    values = aligned.to(torch.float32).contiguous()
    merged: Tensor = chosen.reference(
        values, weight=weight, density=density, normalize=normalize, lambda_=lambda_, **more
    )
    return merged.to(torch.float64)
