"""Distance of two tensors and similarity of two task vectors: one pass, sums in float64.

Row 0 is the first tensor, row 1 the second, row 2 the base where there is one. Sums of the first and of the difference
say all: those of the second would lose what is small in what is large.
"""

from __future__ import annotations

import numpy as np

from merge.arrays import F64, Array, Raw
from merge.kernels.bits import as_f32, kernel, where
from merge.kernels.encode import LANES

# Of a pair, in this order: squares of a, products a d, squares of d = b - a; then how many differ, and the largest |d|.
PAIR = ("aa", "ad", "dd", "changed", "largest")
# And of task vectors u = a - c, v = b - c: squares and products, where both are not zero, and where their signs agree.
TASKS = ("uu", "uv", "vv", "both", "agree")


def difference_of(raw: Array, out: F64) -> int:
    """raw (2 or 3, n) as stored -> out (5,) or (10,) float64, named by PAIR and TASKS; returns numbers left out.

    Where a number is NaN or infinite on one side it is left out, and counted unless both sides are the same.
    """
    if raw.dtype != np.float64:
        if len(raw) == 2:
            _pair(raw, out)
        else:
            _tasks(raw, out)
        if np.isfinite(out).all():
            return 0
        raw = (raw.astype(np.uint32) << np.uint32(16)).view(np.float32) if raw.dtype == np.uint16 else raw
    with np.errstate(all="ignore"):  # signalling NaNs, and sums beyond float64
        return _slowly(raw.astype(np.float64), out)


def _slowly(wide: F64, out: F64) -> int:
    """The same in numpy, for float64 and for what is not finite: both are rare."""
    good = np.isfinite(wide).all(axis=0)
    bad = wide[:, ~good]
    alike = (bad[0] == bad[1]) | (np.isnan(bad[0]) & np.isnan(bad[1]))
    differ = int(np.count_nonzero(~alike))
    a, b = wide[0, good], wide[1, good]
    d = b - a
    out[:5] = (a * a).sum(), (a * d).sum(), (d * d).sum(), np.count_nonzero(d) + differ, np.abs(d).max(initial=0.0)
    if len(wide) == 3:
        u, v = a - wide[2, good], b - wide[2, good]
        both = (u != 0) & (v != 0)
        out[5:] = (u * u).sum(), (u * v).sum(), (v * v).sum(), both.sum(), (both & ((u > 0) == (v > 0))).sum()
    return differ


@kernel
def _pair(raw: Raw, out: F64) -> None:
    lanes = np.zeros((5, LANES), np.float64)
    aa, ad, dd, changed, largest = lanes[0], lanes[1], lanes[2], lanes[3], lanes[4]
    for start in range(0, raw.shape[1], LANES):
        first, second = raw[0, start : start + LANES], raw[1, start : start + LANES]
        for lane in range(len(first)):
            a = np.float64(as_f32(first[lane]))
            d = np.float64(as_f32(second[lane])) - a
            aa[lane] += a * a
            ad[lane] += a * d
            dd[lane] += d * d
            changed[lane] += where(d != 0, 1.0, 0.0)
            size = abs(d)
            largest[lane] = where(size > largest[lane], size, largest[lane])
    for k in range(4):
        out[k] = lanes[k].sum()
    out[4] = largest.max()


@kernel
def _tasks(raw: Raw, out: F64) -> None:
    _pair(raw, out)
    lanes = np.zeros((5, LANES), np.float64)
    uu, uv, vv, both, agree = lanes[0], lanes[1], lanes[2], lanes[3], lanes[4]
    for start in range(0, raw.shape[1], LANES):
        first, second, base = (
            raw[0, start : start + LANES],
            raw[1, start : start + LANES],
            raw[2, start : start + LANES],
        )
        for lane in range(len(first)):
            c = np.float64(as_f32(base[lane]))
            u, v = np.float64(as_f32(first[lane])) - c, np.float64(as_f32(second[lane])) - c
            uu[lane] += u * u
            uv[lane] += u * v
            vv[lane] += v * v
            moved = (u != 0) & (v != 0)
            both[lane] += where(moved, 1.0, 0.0)
            agree[lane] += where(moved & ((u > 0) == (v > 0)), 1.0, 0.0)
    for k in range(5):
        out[5 + k] = lanes[k].sum()
