"""Numbers between the passes of a method: what its definition and its kernel share. No numba, no torch."""

from __future__ import annotations

import math
from collections.abc import Callable

from merge.errors import NumbersError

SLERP_COLINEAR = 0.9995  # |cosine| above which the two directions count as one
NUSLERP_COLINEAR = 1e-6  # |sine| below which float32 directions have no plane
_TINY_WEIGHT = 1e-6
KARCHER_TINY = 1e-7  # length of a sum, or angle, that float64 sums over float32 tensors cannot tell from zero
_ROUNDING = 1e-7  # of the length of a sum of float32 directions
NEARSWAP_LEAST = 1e-6  # distance below which the quotient does not grow
FUSION_EPSILON = 1e-8
FUSION_SHARES = (0.25, 0.5, 0.75)  # quartiles


def slerp_coefficients(square_a: float, square_b: float, dot: float, t: float) -> tuple[float, float]:
    """Factors of the two tensors from their squared norms and dot product. Golden: t=.5, (1,0), (0,2): .7071 each."""
    from merge.kernels.functions import acos, sin

    if square_a == 0 or square_b == 0 or not math.isfinite(square_a * square_b):
        return 1 - t, t
    cosine = dot / math.sqrt(square_a) / math.sqrt(square_b)
    if abs(cosine) > SLERP_COLINEAR:
        return 1 - t, t
    angle = acos(cosine)
    return sin((1 - t) * angle) / sin(angle), sin(t * angle) / sin(angle)


def multislerp_factors(
    lengths: list[float],
    weight: tuple[float, ...],
    normalize: bool,
    eps: float,
    length_of: Callable[[tuple[float, ...]], float],
) -> tuple[float, ...]:
    """What each input is multiplied with, from the inputs' lengths and the length of a sum of them.

    Raises:
        NumbersError: more than two directions cancel.
    """
    if len(weight) == 1:
        return (1.0,)
    total = math.fsum(weight) if normalize else 1.0
    weights = tuple(w / total for w in weight)
    units = tuple(w / (own + eps) if own > 0 else 0.0 for w, own in zip(weights, lengths, strict=True))
    used = math.fsum(abs(unit) * own for unit, own in zip(units, lengths, strict=True))
    if used == 0:
        return units
    length = length_of(units)
    if length < max(eps, _ROUNDING) * used:
        if len(weights) == 2:
            return weights
        raise NumbersError(
            "multislerp: the directions of a tensor's inputs cancel, so that no mean direction is left. "
            "Change the weights, or use karcher."
        )
    scale = math.fsum(w * own for w, own in zip(weights, lengths, strict=True)) / length
    return tuple(unit * scale for unit in units)


def nuslerp_place(weight: tuple[float, ...]) -> float:
    """t of the second model; halfway where the weights cancel"""
    total = math.fsum(weight)
    return 0.5 if abs(total) < _TINY_WEIGHT else weight[1] / total


def fusion_threshold(first: float, median: float, third: float) -> float:
    """The least importance that counts"""
    return median + 1.5 * (third - first)


def unique_factor(shared: int, unique: int, r: float, alpha: float) -> float:
    """Factor of the entries that one model alone changed"""
    return 1 + r * min(shared / unique, alpha) if unique else 1.0
