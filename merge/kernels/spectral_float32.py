"""Decompositions of float32 matrices in half the time of float64 (spectral.py), to 1e-5: for results of 16 bits.

An eigendecomposition of the Gram matrix A^T A in float32 gives V, and loses directions of A below 3e-4 of the largest.
Four things make up for that:
* Directions far stronger than the rest, as what was an adapter has, are found first and made about as strong as the
  rest: that changes no other direction.
* B = A V sees what the Gram matrix hides. The cosines between its columns say to first order how U is off, and are
  corrected; their squares say what is left.
* Directions for which that would be more than LEFT are made orthogonal to the others, and decomposed, in float64.
* Where only the strongest directions are kept, the ones next to the limit are decomposed in float64, and what stronger
  ones hide in the others is corrected by the products of B's columns.
What is left is measured. Where it is too much, or directions are near the noise, Inexact is raised, and the caller
takes float64.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

from merge.kernels.spectral_low_rank import strongest

LEFT = 3e-7  # most that the corrections leave of the cosines, root of the mean square
CUT = 1e-6  # smallest singular value that counts, of the largest
_NEAR = 1.25  # ratio to it, within which float64 decides
_TURNED = 5e-4  # most that the kept directions turn by their correction, in radians (root of the mean square)
_STRONG = 8.0  # strength, of the first beyond a share of the side, from which a direction is far stronger
_SHARES = (64, 16)  # the share for a first look, and that share
_EVEN = 4.0  # largest singular value, of the mean square's root, that has no look at others; of random matrices it is 2
_ROUNDS = 4
_WINDOW = 64  # directions on either side of the limit
_SMALL = 0.01  # singular value, of the largest, from which they are decomposed with those behind the limit
_RANGE = 4.0  # largest singular value, of the smallest kept: up to it no correction is worth its products
_FEW = 256  # weak directions that float64 takes without asking float32 again
_PARTS = 8  # of a Gram matrix, of which one half is computed


class Inexact(ArithmeticError):
    """Float32 does not do for this matrix."""


def thin_svd(matrix: Tensor, rank: int | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """(m, n) -> u (m, k), s (k), v (n, k), float32: the largest singular values first, `rank` of them or all

    Raises:
        Inexact: where the result would not be good to about 1e-5, or a direction of it is near the noise.
    """
    if matrix.shape[0] < matrix.shape[1]:
        v, s, u = thin_svd(matrix.T, rank)
        return u, s, v
    size = float(matrix.abs().max()) if matrix.numel() else 0.0
    if size == 0:
        return matrix[:, :0], matrix.new_zeros(0), matrix.new_zeros(matrix.shape[1], 0)
    if not 1e-8 < size < 1e8:  # squares of float32 end at 1e±38
        raise Inexact
    matrix, strong = _without_strong(matrix)
    u, s, v = _decomposed(matrix, matrix.shape[1] if rank is None else min(rank, matrix.shape[1]))
    if strong is not None:
        count = min(len(s), len(strong[1]))
        for whole, part in zip((u, s, v), strong, strict=True):
            whole[..., :count] = part[..., :count]
    weakest = CUT * s[:1]
    kept = s > weakest
    if ((s > weakest / _NEAR) & (s < weakest * _NEAR)).any():
        raise Inexact
    return (u, s, v) if kept.all() else (u[:, kept], s[kept], v[:, kept])


def _without_strong(matrix: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor] | None]:
    """The matrix with its far stronger directions only twice as strong as the next; their u, s and v, or None"""
    whole, side = matrix.double(), matrix.shape[1]
    _, s, _ = strongest(whole, -(-side // _SHARES[0]), 1)
    if s[0] <= _EVEN * torch.linalg.vector_norm(whole) / side**0.5:
        return matrix, None
    u, s, v = strongest(whole, -(-side // _SHARES[1]), _ROUNDS)
    count = int((s > _STRONG * s[-1]).sum())
    if count == 0:
        return matrix, None
    u, v, excess = u[:, :count], v[:, :count], s[:count] - 2 * s[count]
    return whole.sub_((u * excess) @ v.T).float(), (u.float(), s[:count].float(), v.float())


def _decomposed(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    n = matrix.shape[1]
    try:
        values, v = torch.linalg.eigh(gram(matrix))
    except torch.linalg.LinAlgError as error:
        raise Inexact from error
    values, v = values.flip(0), v.flip(1)
    if not 0 < rank < n:
        u, s, v = _complete(matrix, matrix @ v, v)
        return u[:, :rank], s[:rank], v[:, :rank]
    _settle(matrix, v, rank)
    if 2 * rank > n or values[rank - 1] <= _SMALL**2 * values[0]:
        u, s, v = _complete(matrix, *_turned(matrix @ v, v, rank))
        return u[:, :rank], s[:rank], v[:, :rank]
    if values[rank - 1] * _RANGE**2 >= values[0]:
        v = v[:, :rank]
        b = matrix @ v
    else:
        b, v = (both[:, :rank] for both in _turned(matrix @ v, v, rank))
    u, s, count = _orthonormal(b, 10 * LEFT)  # they turn among themselves, and that makes no difference to others
    if count < rank:
        raise Inexact
    return u, s, v


def polar(matrix: Tensor) -> Tensor:
    """(m, n) -> the nearest matrix with orthonormal columns (or rows), float32; raises Inexact as thin_svd does"""
    u, _, v = thin_svd(matrix)
    return u @ v.T


def gram(matrix: Tensor) -> Tensor:
    """(m, n) -> (n, n): the blocks above the diagonal by products, the others by symmetry"""
    n = matrix.shape[1]
    product = matrix.new_empty(n, n)
    ends = [n * part // _PARTS for part in range(_PARTS + 1)]
    for start, stop in pairwise(ends):
        product[start:stop, start:] = matrix[:, start:stop].T @ matrix[:, start:]
        product[stop:, start:stop] = product[start:stop, stop:].T
    return product


def _settle(matrix: Tensor, v: Tensor, limit: int) -> None:
    """Decomposes the directions next to the limit in float64, among themselves; changes v."""
    window = slice(max(0, limit - _WINDOW), limit + _WINDOW)
    near, _ = torch.linalg.qr(v[:, window].double())
    _, _, turn = torch.linalg.svd(matrix.double() @ near, full_matrices=False)
    v[:, window] = (near @ turn.T).float()


def _turned(b: Tensor, v: Tensor, limit: int) -> tuple[Tensor, Tensor]:
    """b = A v and v, with the directions before the limit and those behind it made orthogonal also in b"""
    squares = torch.linalg.vector_norm(b, dim=0).square()
    turn = (b[:, limit:].T @ b[:, :limit]).div_(squares[:limit] - squares[limit:, None])
    turn[:_WINDOW, max(0, limit - _WINDOW) :] = 0.0  # settled, and the differences are small
    if not torch.linalg.vector_norm(turn) <= _TURNED * limit**0.5:
        raise Inexact
    first, second = (
        torch.cat([both[:, :limit] + both[:, limit:] @ turn, both[:, limit:] - both[:, :limit] @ turn.T], dim=1)
        for both in (b, v)
    )
    return first, second


def _orthonormal(b: Tensor, most: float = LEFT) -> tuple[Tensor, Tensor, int]:
    """The polar factor of as many of the first columns of b as `most` allows, their lengths, and how many; changes b

    With b = c diag(s) and c^T c = 1 + t it is c (1 - [t_ij s_i / (s_i + s_j)]), but for squares of t.
    """
    s = torch.linalg.vector_norm(b, dim=0)
    b.div_(s)
    cosines = gram(b)
    cosines.diagonal().zero_()
    squares = torch.linalg.vector_norm(cosines.tril(), dim=1).double().square()
    left = (2 * squares).square().cumsum(0)
    count = int((left <= most**2 * len(s)).sum())
    s, cosines = s[:count], cosines[:count, :count]
    turn = cosines.mul_(s[:, None] / (s[:, None] + s)).neg_()
    turn.diagonal().fill_(1.0)
    return b[:, :count] @ turn, s, count


def _complete(matrix: Tensor, b: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """All of u, s and v, from b = A v; changes b"""
    u, s, count = _orthonormal(b)
    n = v.shape[1]
    if count == n:
        return u, s, v
    if 8 * count < n:
        raise Inexact
    # What the weak directions lean on is that of the strong ones which V's rounding left in them.
    weak = v[:, count:].double()
    b = matrix.double() @ weak
    leaning = u.T @ b.float()
    for _ in range(2):
        b -= (u @ (u.T @ b.float())).double()
    u_weak, s_weak, turn = _few(b) if n - count <= _FEW else thin_svd(b.float())
    lean = (leaning @ turn).div_(s[:, None] + s_weak)
    return (
        torch.cat([u - u_weak @ lean.T, u_weak + u @ lean], dim=1),
        torch.cat([s, s_weak]),
        torch.cat([v[:, :count], v[:, count:] @ turn], dim=1),
    )


def _few(matrix: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    u, s, vt = torch.linalg.svd(matrix, full_matrices=False)
    return u.float(), s.float(), vt.T.float()
