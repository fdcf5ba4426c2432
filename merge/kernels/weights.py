"""Represents weights as integers, so that sign election is exact where a recipe's decimals cancel.

0.3 d + 0.3 d - 0.6 d is 0 on paper and 5.6e-17 d in float64. bfloat16 task vectors are small multiples of one step, so
such sums are common (one element in 500 of a three-model TIES), and zero counts as + while a rounding error has either
sign. Weights 3, 3 and -6 give sums that float64 holds exactly; the common factor is taken out at the end.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

_DENOMINATOR = 10_000  # gradients over layers give fractions such as 0.7 * 3/39
_LARGEST = 1 << 20  # times a float32 and a few models: within float64's 53 bits
_TINY_WEIGHT = 1e-8  # a sum of weights below this does not normalise
_ROUNDING = 4 * 2.0**-53


def whole(numbers: Sequence[float]) -> tuple[tuple[float, ...], float]:
    """Numbers that are short fractions -> (multiples, scale), multiple = number * scale; else as they are, and 1."""
    return _whole(tuple(numbers))


@functools.lru_cache(maxsize=256, typed=True)
def _whole(numbers: tuple[float, ...]) -> tuple[tuple[float, ...], float]:
    fractions = [Fraction(number).limit_denominator(_DENOMINATOR) for number in numbers]
    common = math.lcm(*(fraction.denominator for fraction in fractions))
    multiples = [int(fraction * common) for fraction in fractions]
    meant = all(
        abs(float(fraction) - number) <= _ROUNDING * abs(number)
        for fraction, number in zip(fractions, numbers, strict=True)
    )
    if not meant or common > _LARGEST or any(abs(multiple) > _LARGEST for multiple in multiples):
        return numbers, 1.0
    return tuple(float(multiple) for multiple in multiples), float(common)


def divisor(weight: tuple[float, ...], normalize: bool) -> float:
    """What `normalize` divides by without election: the sum of weights, unless it is next to nothing"""
    total = math.fsum(weight)
    return total if normalize and abs(total) >= _TINY_WEIGHT else 1.0


def factors_of_sum(parameters: dict[str, Any]) -> tuple[float, ...]:
    """What each input is multiplied with in lambda sum_i w_i x_i, divided by the weights' sum with `normalize`."""
    own: tuple[float, ...] = parameters["weight"]
    by = divisor(own, parameters.get("normalize", False))
    return tuple(weight * (parameters.get("lambda", 1.0) / by) for weight in own)


def factors_of_mean(parameters: dict[str, Any]) -> tuple[float, ...]:
    """What each input is multiplied with in sum_i w_i x_i / sum_i w_i."""
    own: tuple[float, ...] = parameters["weight"]
    by = math.fsum(own) if parameters.get("normalize", True) else 1.0
    return tuple(weight * (1.0 / by) for weight in own)


@dataclass(frozen=True)
class Election:
    """How entries are voted on and summed: weights and factors as whole numbers where they are short fractions.

    Attributes:
        divisors: for each model what its entries that agree add to the divisor.
        factors: what each model's task vector is multiplied with.
        divide: whether the sum of what agrees is divided at all.
        scale: factor of the result.
        by_count: the sign of most entries is elected, not that of their sum.
    """

    divisors: tuple[float, ...]
    factors: tuple[float, ...]
    divide: bool
    scale: float
    by_count: bool


def election(
    weight: tuple[float, ...],
    factors: tuple[float, ...],
    normalize: bool,
    lambda_: float,
    consensus: str = "sum",
    divide_by: str = "weights",
    merge_func: str = "normalize",
) -> Election:
    """The parameters that all methods with election share, put together; factors: weights times what rescales them."""
    both, scale = whole(weight + factors)
    divide = merge_func == "mean" or (merge_func == "normalize" and normalize)
    by_weights = divide and divide_by == "weights"  # then the scale cancels out
    divisors = both[: len(weight)] if by_weights else (1.0,) * len(weight)
    return Election(
        divisors, both[len(weight) :], divide, lambda_ if by_weights else lambda_ / scale, consensus == "count"
    )
