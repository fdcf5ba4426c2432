"""Sums over the task vectors of several models at once, whole and trimmed: what `merge analyse` measures by element.

Row 0 is the base, rows 1.. are its fine-tunes; d_i is fine-tune minus base. Sums are float64, over tiles that stay in
cache. A level is a degree of trimming: an entry of d_i counts in it if its magnitude reaches the level's threshold.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from merge.arrays import F64, U32, Raw
from merge.kernels.bits import as_f32, binade, kernel, magnitude_bits, where
from merge.kernels.encode import LANES
from merge.kernels.protocol import Block
from merge.kernels.selection import Threshold
from merge.kernels.sparsify import columns, edges

# Of each d: products with the base; how many entries are not zero; the largest magnitude; the sum of magnitudes below
# half a bfloat16 ulp of the base, for d and for `share` d; squares of the fine-tune's binades.
ALONE = ("cross", "changed", "largest", "lost", "lost_at_share", "binades")
# Of each d at each level: squares, sum of magnitudes, entries that are not zero.
KEPT = ("squares", "magnitude", "count")
# Of each pair u, v at each level: products; entries where both are not zero, and where their signs then differ; the sum
# of |u + v|.
PAIRED = ("product", "both", "opposed", "joint")
_TILE = 1024
_HALF_ULP = 2.0**-8  # of bfloat16, relative to the binade


class DeltaLayout:
    """Where the sums of `n` models at `levels` levels lie in one vector of `size` numbers."""

    def __init__(self, n: int, levels: int) -> None:
        n_pairs = n * (n - 1) // 2
        self.shapes = ((1,), (n, len(ALONE)), (levels, n, len(KEPT)), (levels, n_pairs, len(PAIRED)), (levels,))
        self.size = sum(int(np.prod(shape)) for shape in self.shapes)

    def parts(self, sums: F64) -> list[F64]:
        """As views: squares of the base (1,); ALONE (model, sum), KEPT (level, model, sum), PAIRED (level, pair, sum);
        and the magnitudes of the sum of all d (level,)."""
        places = np.cumsum([int(np.prod(shape)) for shape in self.shapes])[:-1]
        return [part.reshape(shape) for part, shape in zip(np.split(sums, places), self.shapes, strict=True)]

    def total(self, parts: Sequence[F64]) -> F64:
        """Of several chunks or tensors, in their order: sums, and the maximum of what is the largest"""
        every = np.array(parts).reshape(-1, self.size)
        found: F64 = every.sum(axis=0)
        self.parts(found)[1][:, ALONE.index("largest")] = np.max(
            [self.parts(each)[1][:, ALONE.index("largest")] for each in every], axis=0, initial=0.0
        )
        return found


def delta_sums(block: Block, thresholds: Sequence[Sequence[Threshold]], share: float, layout: DeltaLayout) -> F64:
    """The sums of one block, (layout.size,) float64.

    Args:
        block: raw (1 + n, elements), base first.
        thresholds: of each level, one for each model.
        share: the weight of a model in the uniform average.
    """
    out = np.zeros(layout.size)
    base, alone, kept, pairs, joint = layout.parts(out)
    for start, stop in edges(block, [each.cut for level in thresholds for each in level]):
        place = block.start + start
        least = np.array([[each.at(place) for each in level] for level in thresholds], np.uint32)
        raw = block.raw if stop - start == block.raw.shape[1] else columns(block, start, stop)
        _sums(raw, least, share, base, alone, kept, pairs, joint)
    return out


@kernel
def _sums(raw: Raw, least: U32, share: float, base: F64, alone: F64, kept: F64, pairs: F64, joint: F64) -> None:
    n = raw.shape[0] - 1
    deltas, trimmed = np.empty((n, _TILE)), np.empty((n, _TILE))
    sizes, total = np.empty((n, _TILE), np.uint32), np.empty(_TILE)
    for start in range(0, raw.shape[1], _TILE):
        b = raw[0, start : start + _TILE]
        width = len(b)
        base[0] += _squares(b)
        for m in range(n):
            _alone(b, raw[m + 1, start : start + _TILE], share, deltas[m, :width], sizes[m, :width], alone[m])
        for level in range(len(least)):
            total[:] = 0.0
            for m in range(n):
                _trim(deltas[m, :width], sizes[m, :width], least[level, m], trimmed[m, :width], total, kept[level, m])
            pair = 0
            for i in range(n):
                for j in range(i + 1, n):
                    _pair(trimmed[i, :width], trimmed[j, :width], pairs[level, pair])
                    pair += 1
            joint[level] += _magnitude(total[:width])


@kernel
def _squares(values: Raw) -> float:
    lanes = np.zeros(LANES, np.float64)
    for start in range(0, len(values), LANES):
        part = values[start : start + LANES]
        for lane in range(len(part)):
            x = np.float64(as_f32(part[lane]))
            lanes[lane] += x * x
    return float(lanes.sum())


@kernel
def _magnitude(values: F64) -> float:
    lanes = np.zeros(LANES, np.float64)
    for start in range(0, len(values), LANES):
        part = values[start : start + LANES]
        for lane in range(len(part)):
            lanes[lane] += abs(part[lane])
    return float(lanes.sum())


@kernel
def _alone(base: Raw, model: Raw, share: float, delta: F64, size: U32, out: F64) -> None:
    """What is measured of one model without trimming; fills its tile of d, and of the bits of |d|."""
    lanes = np.zeros((6, LANES), np.float64)
    cross, changed, largest, lost, shared, binades = lanes[0], lanes[1], lanes[2], lanes[3], lanes[4], lanes[5]
    for start in range(0, len(base), LANES):
        first, second = base[start : start + LANES], model[start : start + LANES]
        d, bits = delta[start : start + LANES], size[start : start + LANES]
        for lane in range(len(first)):
            b, x = as_f32(first[lane]), as_f32(second[lane])
            bits[lane] = magnitude_bits(x - b)
            wide = np.float64(x) - np.float64(b)
            d[lane] = wide
            least, length = np.float64(binade(b)) * _HALF_ULP, abs(wide)
            cross[lane] += np.float64(b) * wide
            changed[lane] += where(wide != 0, 1.0, 0.0)
            largest[lane] = where(length > largest[lane], length, largest[lane])
            lost[lane] += where(length < least, length, 0.0)
            shared[lane] += where(share * length < least, length, 0.0)
            unit = np.float64(binade(x))
            binades[lane] += unit * unit
    out[0] += cross.sum()
    out[1] += changed.sum()
    out[2] = max(out[2], largest.max())
    out[3] += lost.sum()
    out[4] += shared.sum()
    out[5] += binades.sum()


@kernel
def _trim(delta: F64, size: U32, least: np.uint32, kept: F64, total: F64, out: F64) -> None:
    """d where it is kept, else 0; adds it to the tile's total."""
    lanes = np.zeros((3, LANES), np.float64)
    squares, magnitude, count = lanes[0], lanes[1], lanes[2]
    for start in range(0, len(delta), LANES):
        d, bits = delta[start : start + LANES], size[start : start + LANES]
        into, sums = kept[start : start + LANES], total[start : start + LANES]
        for lane in range(len(d)):
            value = where(bits[lane] >= least, d[lane], 0.0)
            into[lane] = value
            sums[lane] += value
            squares[lane] += value * value
            magnitude[lane] += abs(value)
            count[lane] += where(value != 0, 1.0, 0.0)
    for k in range(3):
        out[k] += lanes[k].sum()


@kernel
def _pair(first: F64, second: F64, out: F64) -> None:
    lanes = np.zeros((4, LANES), np.float64)
    product, both, opposed, joint = lanes[0], lanes[1], lanes[2], lanes[3]
    for start in range(0, len(first), LANES):
        a, b = first[start : start + LANES], second[start : start + LANES]
        for lane in range(len(a)):
            u, v = a[lane], b[lane]
            product[lane] += u * v
            moved = (u != 0) & (v != 0)
            both[lane] += where(moved, 1.0, 0.0)
            opposed[lane] += where(moved & ((u > 0) != (v > 0)), 1.0, 0.0)
            joint[lane] += abs(u + v)
    for k in range(4):
        out[k] += lanes[k].sum()
