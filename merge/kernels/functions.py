"""Elementary functions whose last bits are the same on every machine.

The C library chooses its code by the processor (with or without fused multiply-add), and numpy and torch bring
functions of their own, so their results differ in the last bit from machine to machine. IEEE 754 fixes additions,
products, divisions and square roots bit for bit, and nothing else is used here. Errors are at most 8 units in the last
place.
"""

from __future__ import annotations

import math

import numpy as np

from merge.arrays import F64
from merge.kernels.bits import Int, frexp, kernel, power_of_two_f64, where

_LEAST = -700.0  # exponents are not taken further down
_LOG2_E = 1.4426950408889634
_LN2_HIGH, _LN2_LOW = 0.693147180369123816490, 1.90821492927058770002e-10  # ln 2 in two parts; fdlibm, e_exp.c
_LN2, _SQRT_HALF = math.log(2.0), math.sqrt(0.5)
_HALF_PI_HIGH, _HALF_PI_LOW = 1.57079632673412561417, 6.07710050650619224932e-11  # of 33 bits, and the rest; the same
_TWO_BY_PI = 2 / math.pi
_MOST_QUARTERS = 1e6  # angles up to this are reduced by products that are exact
NEAR = 1 / 8  # largest |x| of `expm1_near`


@kernel
def exp_down(x: float) -> float:
    """exp of x <= 0: 2^k times the Taylor polynomial of degree 13 at |f| <= ln 2 / 2; below -700 that of -700"""
    x = max(x, _LEAST)
    k = np.int32(x * _LOG2_E - 0.5)
    f = (x - k * _LN2_HIGH) - k * _LN2_LOW
    p = 1 / 6227020800
    p = p * f + 1 / 479001600
    p = p * f + 1 / 39916800
    p = p * f + 1 / 3628800
    p = p * f + 1 / 362880
    p = p * f + 1 / 40320
    p = p * f + 1 / 5040
    p = p * f + 1 / 720
    p = p * f + 1 / 120
    p = p * f + 1 / 24
    p = p * f + 1 / 6
    p = p * f + 1 / 2
    p = p * f + 1.0
    p = p * f + 1.0
    return p * power_of_two_f64(k)


@kernel
def exp(x: float) -> float:
    """exp of |x| <= 700; beyond, that of 700 or -700"""
    down = exp_down(-abs(x))
    return where(x != x, x, where(x <= 0.0, down, 1.0 / down))


@kernel
def expm1_near(x: float) -> float:
    """exp(x) - 1 for |x| <= NEAR by its Taylor polynomial of degree 10"""
    p = 1 / 3628800
    p = p * x + 1 / 362880
    p = p * x + 1 / 40320
    p = p * x + 1 / 5040
    p = p * x + 1 / 720
    p = p * x + 1 / 120
    p = p * x + 1 / 24
    p = p * x + 1 / 6
    p = p * x + 1 / 2
    p = p * x + 1.0
    return p * x


@kernel
def expm1(x: float) -> float:
    """exp(x) - 1"""
    return where(abs(x) <= NEAR, expm1_near(x), exp(x) - 1.0)


@kernel
def log(x: float) -> float:
    """ln(x), 0 < x < infinity: x = m 2^e, and ln m by the series of atanh((m - 1) / (m + 1))"""
    mantissa, power = frexp(x)
    low = mantissa < _SQRT_HALF
    mantissa, power = where(low, 2.0 * mantissa, mantissa), where(low, power - 1.0, power)
    z = (mantissa - 1.0) / (mantissa + 1.0)
    square, total = z * z, 0.0
    for n in range(23, 0, -2):
        total = total * square + 1.0 / n
    return 2.0 * z * total + power * _LN2


@kernel
def log1p(x: float) -> float:
    """ln(1 + x), x > -1; the second term makes up for the rounding of 1 + x"""
    sum_ = 1.0 + x
    return log(sum_) - ((sum_ - 1.0) - x) / sum_


@kernel
def tanh(x: float) -> float:
    size = abs(x)
    near, far = expm1_near(2.0 * size), exp(-2.0 * size)
    small = size <= NEAR / 2
    value = where(small, near, 1.0 - far) / where(small, near + 2.0, 1.0 + far)
    return where(x < 0.0, -value, value)


@kernel
def exp_all(values: F64) -> None:
    """values (n,) float64 -> exp of each, in place"""
    for i in range(len(values)):
        values[i] = exp(values[i])


@kernel
def tanh_all(values: F64) -> None:
    """values (n,) float64 -> tanh of each, in place"""
    for i in range(len(values)):
        values[i] = tanh(values[i])


@kernel
def sin(x: float) -> float:
    return _turned(x, 0)


@kernel
def cos(x: float) -> float:
    return _turned(x, 1)


@kernel
def acos(x: float) -> float:
    """Angle in [0, pi] of -1 <= x <= 1: twice that of the sine sqrt((1 - |x|) / 2), by Newton's method"""
    sine = math.sqrt((1.0 - abs(x)) * 0.5)
    square = sine * sine
    half = sine * (1.0 + square * (1 / 6 + square * (3 / 40)))
    for _ in range(3):
        half += (sine - sin(half)) / cos(half)
    return math.pi - 2.0 * half if x < 0.0 else 2.0 * half


@kernel
def _turned(x: float, quarters: Int) -> float:
    """sin(x + quarters pi / 2)"""
    if not abs(x) < _MOST_QUARTERS:
        x %= 2.0 * math.pi
    if x != x:
        return x
    k = math.floor(x * _TWO_BY_PI + 0.5)
    f = (x - k * _HALF_PI_HIGH) - k * _HALF_PI_LOW
    quarters += np.int64(k)
    value = _cos_near(f) if quarters % 2 else _sin_near(f)
    return -value if quarters % 4 >= 2 else value


@kernel
def _sin_near(x: float) -> float:
    """For |x| <= pi / 4, by its Taylor polynomial of degree 17"""
    s = x * x
    p = 1 / 355687428096000
    p = 1 / 1307674368000 - p * s
    p = 1 / 6227020800 - p * s
    p = 1 / 39916800 - p * s
    p = 1 / 362880 - p * s
    p = 1 / 5040 - p * s
    p = 1 / 120 - p * s
    p = 1 / 6 - p * s
    return x - x * (s * p)


@kernel
def _cos_near(x: float) -> float:
    """For |x| <= pi / 4, by its Taylor polynomial of degree 18"""
    s = x * x
    p = 1 / 6402373705728000
    p = 1 / 20922789888000 - p * s
    p = 1 / 87178291200 - p * s
    p = 1 / 479001600 - p * s
    p = 1 / 3628800 - p * s
    p = 1 / 40320 - p * s
    p = 1 / 720 - p * s
    p = 1 / 24 - p * s
    p = 1 / 2 - p * s
    return 1.0 - s * p
