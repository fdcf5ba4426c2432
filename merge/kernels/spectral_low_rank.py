"""Decompositions of matrices of low rank, such as what an adapter changed: exact, in a hundredth of the time.

Source: subspace iteration from random vectors, Halko, Martinsson, Tropp, SIAM Review 53 (2011), algorithm 4.4.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

_LEAST = 512  # sides below take no time either way
_SHARES = (64, 16)  # of the side, that is the width of the subspace; tried in this order
_SPARE = 4  # share of its directions that must turn out to be noise
_FULL = 1e-3  # a random subspace whose vectors are all longer than this, of the longest, is that of no low rank
_APART = 1e-3  # strongest noise, of the weakest direction, from which one round leaves 1e-9
_ROUNDS = 3


def low_rank_svd(matrix: Tensor, cut: float, largest: float = 0.0) -> tuple[Tensor, Tensor, Tensor] | None:
    """(m, n) float64 -> u (m, k), s (k), v (n, k) with all s above cut; None if the rank is not low for certain

    Args:
        cut: the smallest singular value that counts, of the largest; those below half of it are noise. Where one is
            in between, or k comes near min(m, n) / 16, this function does not decide.
        largest: the singular value that `cut` is relative to, if it is larger than the matrix's own.
    """
    side = min(matrix.shape)
    found = None
    for share in _SHARES if side >= _LEAST else ():
        found = found or _within(matrix, side // share, cut, largest)
    return found


def strongest(matrix: Tensor, width: int, rounds: int) -> tuple[Tensor, Tensor, Tensor]:
    """(m, n) float64 -> u (m, width), s (width), v (n, width): about the largest singular values

    A direction of strength s is exact to (s' / s)^(2 rounds + 1) of itself, s' the first beyond the width.
    """
    q, _ = torch.linalg.qr(matrix @ _random(matrix, width))
    for _ in range(rounds):
        q, _ = torch.linalg.qr(matrix.T @ q)
        q, _ = torch.linalg.qr(matrix @ q)
    v, s, turn = torch.linalg.svd(matrix.T @ q, full_matrices=False)
    return q @ turn.T, s, v


def _random(matrix: Tensor, width: int) -> Tensor:
    random = np.random.Generator(np.random.Philox(0)).standard_normal((matrix.shape[1], width))
    return torch.from_numpy(random).to(matrix.device)


def _within(matrix: Tensor, width: int, cut: float, largest: float) -> tuple[Tensor, Tensor, Tensor] | None:
    q, r = torch.linalg.qr(matrix @ _random(matrix, width))
    lengths = torch.linalg.svdvals(r)
    if lengths[-1] > _FULL * max(float(lengths[0]), largest):
        return None
    for _ in range(_ROUNDS):
        q, _ = torch.linalg.qr(matrix.T @ q)
        q, s, _ = torch.linalg.svd(matrix @ q, full_matrices=False)
        limit = cut * max(float(s[0]), largest)
        count = int((s > limit).sum())
        if count + width // _SPARE > width or s[count] > limit / 2:
            return None
        if count == 0 or s[count] <= _APART * s[count - 1]:
            break
    u, s = q[:, :count], s[:count]
    return u, s, (matrix.T @ u) / s
