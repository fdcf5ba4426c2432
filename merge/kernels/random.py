"""Normal and uniform numbers as functions of (key, element index): the same on any machine, in blocks of any size.

32 random bits come from the mixer that random masks use; the normal number is their quantile. Only additions, products,
divisions and square roots are used, which IEEE defines exactly; a logarithm from a library would differ by machine.
"""

from __future__ import annotations

import math

import numpy as np

from merge.arrays import F32
from merge.kernels.bits import add32, counter32, kernel, mix32, part, where
from merge.kernels.functions import log

_SPLIT = 0.425

# Wichura 1988, "Algorithm AS 241: The Percentage Points of the Normal Distribution", PPND7; accurate to 1e-7.
_A = (3.3871327179, 50.434271938, 159.29113202, 59.109374720)
_B = (17.895169469, 78.757757664, 67.187563600)
_C = (1.4234372777, 2.7568153900, 1.3067284816, 0.17023821103)
_D = (0.73700164250, 0.12021132975)
_E = (6.6579051150, 3.0812263860, 0.42868294337, 0.017337203997)
_F = (0.24197894225, 0.012258202635)


def split_key(key: int) -> tuple[np.uint32, np.uint32]:
    """A 64-bit key -> the two that kernels take."""
    return np.uint32(key & 0xFFFFFFFF), np.uint32(key >> 32)


@kernel
def _bits(index: int, key: np.uint32, other_key: np.uint32) -> np.uint32:
    """32 random bits; the index's high half goes into the second key, so that more than 2^32 elements differ"""
    high = np.uint32((index >> 32) * 0x85EBCA6B & 0xFFFFFFFF)
    return mix32(add32(add32(mix32(counter32(np.int64(index), key)), other_key), high))


@part
def normal_quantile(p: float) -> float:
    """Standard normal quantile of 0 < p < 1"""
    q = p - 0.5
    r = _SPLIT * _SPLIT - q * q
    middle = q * (((_A[3] * r + _A[2]) * r + _A[1]) * r + _A[0]) / (((_B[2] * r + _B[1]) * r + _B[0]) * r + 1.0)
    far = math.sqrt(-log(min(p, 1.0 - p)))
    r = far - 1.6
    near_tail = (((_C[3] * r + _C[2]) * r + _C[1]) * r + _C[0]) / ((_D[1] * r + _D[0]) * r + 1.0)
    r = far - 5.0
    far_tail = (((_E[3] * r + _E[2]) * r + _E[1]) * r + _E[0]) / ((_F[1] * r + _F[0]) * r + 1.0)
    tail = where(far <= 5.0, near_tail, far_tail)
    return where(abs(q) <= _SPLIT, middle, where(q < 0.0, -tail, tail))


@kernel
def fill_normal(start: int, key: np.uint32, other_key: np.uint32, scale: float, out: F32) -> None:
    """out (n,) float32: elements start .. start + n of normal numbers with mean 0 and standard deviation `scale`"""
    for i in range(out.shape[0]):
        p = (np.float64(_bits(start + i, key, other_key)) + 0.5) * (1.0 / 4294967296.0)
        out[i] = np.float32(scale * normal_quantile(p))


@kernel
def fill_uniform(start: int, key: np.uint32, other_key: np.uint32, scale: float, out: F32) -> None:
    """out (n,) float32: elements start .. start + n of uniform numbers from -scale to scale"""
    for i in range(out.shape[0]):
        p = (np.float64(_bits(start + i, key, other_key)) + 0.5) * (1.0 / 4294967296.0)
        out[i] = np.float32(scale * (2.0 * p - 1.0))
