"""Measures deltas by element: one pass for thresholds and one for sums, streamed as a merge is."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from merge.dtypes import DTYPES
from merge.engine.tensor import StepTensor
from merge.kernels.deltas import ALONE, KEPT, PAIRED, DeltaLayout, delta_sums
from merge.kernels.selection import KEEP_ALL, count_kept, largest
from merge.plan import TensorRef
from merge.sources.recast import recast

# Shares of each tensor's entries that stay, the largest; 1: all.
DENSITIES = (1.0, 0.5, 0.2, 0.1)
# Bits of the significand behind the point: a number is rounded by up to half of 2^-bits of its binade.
_FRACTION = {"BF16": 7, "F16": 10, "F32": 23, "F64": 23, "F8_E4M3": 3, "F8_E5M2": 2}


@dataclass(frozen=True)
class DeltaMeasures:
    """What one model's delta d = model - base is in a tensor or a group of tensors.

    Attributes:
        norm: |d|; relative: |d| / |b|; None where the base is zero.
        weight_cosine: of the model's weights with the base's; None if one of them is zero.
        changed: share of entries that are not equal to the base's.
        largest: of |d|.
        lost: share of |d| (sum of magnitudes) that lies below half a bfloat16 ulp of the base; adding it to a base in
            bfloat16 changes nothing. `lost_at_share`: the same of d / n, n being the number of models.
        energy: by density, share of |d|^2 that the largest entries of each tensor have.
        rounding: what rounding the model to its dtype adds to |d|^2, as a share of it; at most 1.
    """

    norm: float
    relative: float | None
    weight_cosine: float | None
    changed: float
    largest: float
    lost: float
    lost_at_share: float
    energy: tuple[float, ...]
    rounding: float


@dataclass(frozen=True)
class PairMeasures:
    """How the deltas u and v of two models lie to each other; by density where it says so. None where undefined.

    Attributes:
        cosine: of u and v.
        conflict: by density, share of entries with different signs, of those that both change (and keep).
        cancelled: by density, share of magnitude that cancels in the sum: 1 - sum |u + v| / sum (|u| + |v|).
        overlap: by density, entries that both keep, of those that the model with fewer keeps; by chance the density.
    """

    cosine: float | None
    conflict: tuple[float | None, ...]
    cancelled: tuple[float | None, ...]
    overlap: tuple[float | None, ...]


@dataclass(frozen=True)
class Measures:
    """Of a tensor or a group.

    Attributes:
        size: entries; models and pairs: in the order of the analysis.
        cancelled: by density, share of all models' magnitude that cancels in their sum.
        equal_length: the weight w at which w (d_1 + ... + d_n) is as long as the deltas are on average (root mean
            square): 1/n for equal deltas, 1/sqrt(n) for orthogonal ones; None if the sum is zero.
    """

    size: int
    models: tuple[DeltaMeasures, ...]
    pairs: tuple[PairMeasures, ...]
    cancelled: tuple[float | None, ...]
    equal_length: float | None


@dataclass(frozen=True)
class DeltaSums:
    """Sums of a tensor, or of several: everything by element follows from them. `values`: see merge.kernels.deltas."""

    n_models: int
    size: int
    values: tuple[float, ...]
    rounding: tuple[float, ...]  # of each model, the squares that rounding to its dtype gives

    @staticmethod
    def total(parts: Sequence[DeltaSums]) -> DeltaSums:
        """Of one tensor or more, in their order."""
        n = parts[0].n_models
        values = _layout(n).total([np.array(part.values) for part in parts])
        rounding = np.sum([part.rounding for part in parts], axis=0)
        return DeltaSums(n, sum(part.size for part in parts), tuple(values.tolist()), tuple(rounding.tolist()))

    def measures(self) -> Measures:
        base, alone, kept, paired, joint = _layout(self.n_models).parts(np.array(self.values))
        n, levels = self.n_models, range(len(DENSITIES))
        squares = kept[:, :, KEPT.index("squares")]
        magnitude, count = kept[:, :, KEPT.index("magnitude")], kept[:, :, KEPT.index("count")]
        models = []
        for m in range(n):
            one = dict(zip(ALONE, alone[m].tolist(), strict=True))
            dd, bb = float(squares[0, m]), float(base[0])
            length = math.sqrt(max(0.0, bb + 2 * one["cross"] + dd))
            models.append(
                DeltaMeasures(
                    norm=math.sqrt(dd),
                    relative=ratio(math.sqrt(dd), math.sqrt(bb)),
                    weight_cosine=_cosine(bb + one["cross"], math.sqrt(bb) * length),
                    changed=one["changed"] / max(1, self.size),
                    largest=one["largest"],
                    lost=ratio(one["lost"], float(magnitude[0, m])) or 0.0,
                    lost_at_share=ratio(one["lost_at_share"], float(magnitude[0, m])) or 0.0,
                    energy=tuple(ratio(float(squares[level, m]), dd) or 0.0 for level in levels),
                    rounding=min(1.0, ratio(self.rounding[m], dd) or 0.0),
                )
            )
        pairs = []
        for place, (i, j) in enumerate(pairs_of(n)):
            of = {key: paired[:, place, k].tolist() for k, key in enumerate(PAIRED)}
            sums = [float(magnitude[level, i] + magnitude[level, j]) for level in levels]
            least = [float(min(count[level, i], count[level, j])) for level in levels]
            pairs.append(
                PairMeasures(
                    cosine=_cosine(of["product"][0], math.sqrt(squares[0, i]) * math.sqrt(squares[0, j])),
                    conflict=tuple(ratio(of["opposed"][level], of["both"][level]) for level in levels),
                    cancelled=tuple(_rest(of["joint"][level], sums[level]) for level in levels),
                    overlap=tuple(ratio(of["both"][level], least[level]) for level in levels),
                )
            )
        whole = float(squares[0].sum()) + 2 * float(paired[0, :, PAIRED.index("product")].sum())
        mean = float(squares[0].mean())
        return Measures(
            size=self.size,
            models=tuple(models),
            pairs=tuple(pairs),
            cancelled=tuple(_rest(float(joint[level]), float(magnitude[level].sum())) for level in levels),
            equal_length=ratio(math.sqrt(mean), math.sqrt(max(0.0, whole))),
        )


def pairs_of(n: int) -> list[tuple[int, int]]:
    """(i, j) with i < j, in the order of all lists of pairs"""
    return [(i, j) for i in range(n) for j in range(i + 1, n)]


def readable(refs: Sequence[TensorRef]) -> tuple[TensorRef, ...]:
    """Tensors side by side as the kernels read them: float64 is rounded to float32."""
    return tuple(recast(ref, "F32") if ref.dtype == "F64" else ref for ref in refs)


def measure(tensor: StepTensor, dtypes: Sequence[str]) -> DeltaSums:
    """The sums of one tensor; source 0 is the base.

    Args:
        dtypes: in which each model is stored.
    """
    n = len(tensor.sources) - 1
    layout = _layout(n)
    keeps = [count_kept(density, tensor.size) for density in DENSITIES[1:] for _ in range(n)]
    found = largest(tensor, keeps, list(range(n)) * (len(DENSITIES) - 1)) if tensor.size else [KEEP_ALL] * len(keeps)
    levels = [[KEEP_ALL] * n, *(found[start : start + n] for start in range(0, len(found), n))]
    total = layout.total(tensor.map_chunks(lambda block: delta_sums(block, levels, 1 / n, layout)))
    alone = [dict(zip(ALONE, values, strict=True)) for values in layout.parts(total)[1].tolist()]
    rounding = [
        _rounding(dtype) * a["binades"] if a["changed"] else 0.0 for dtype, a in zip(dtypes, alone, strict=True)
    ]
    return DeltaSums(n, tensor.size, tuple(total.tolist()), tuple(rounding))


def _rounding(dtype: str) -> float:
    """Mean square of the rounding of a number of binade 1: a twelfth of an ulp's square."""
    assert DTYPES[dtype].is_float
    return float(4.0 ** -_FRACTION[dtype]) / 12


def _layout(n: int) -> DeltaLayout:
    return DeltaLayout(n, len(DENSITIES))


def ratio(part: float, whole: float) -> float | None:
    return part / whole if whole else None


def _rest(part: float, whole: float) -> float | None:
    return max(0.0, 1 - part / whole) if whole else None


def _cosine(product: float, lengths: float) -> float | None:
    return max(-1.0, min(1.0, product / lengths)) if lengths else None
