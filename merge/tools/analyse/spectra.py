"""Measures deltas by matrix: singular values, directions that models share, and singular task interference.

Each matrix is read whole, or every k-th row of it beyond LIMIT numbers, so memory is bounded; a randomised range finder
gives its WIDTH largest singular values (Halko, Martinsson, Tropp, SIAM Review 53 (2011), algorithms 4.4 and 5.1). What
they leave of the fourth powers is estimated by random vectors (Meyer et al. 2021, "Hutch++", arXiv:2010.09649).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import xxhash
from torch import Tensor

from merge.checkpoint.reader import SourceReader
from merge.kernels.spectral import thin_svd
from merge.plan import TensorRef
from merge.tools.analyse.elements import pairs_of

LIMIT = 1 << 24  # numbers of a matrix that is read whole: 64 MiB each of base and delta
WIDTH = 64  # singular values that are computed
RANKS = (1, 2, 4, 8, 16, 32, 64)  # of the energy curve
SHARED = 16  # directions of each model that are compared with those of others
_OVERSAMPLING = 10
_PROBES = 16
_POWERS = 2
_LEAST = 1e-5  # share of energy that float32 arithmetic may leave
_TOLERANCE = 1.1  # of what is expected of noise
_GAP = 2.0  # between the last singular value of a delta and the first of its rounding
_MOST_NOISE = 0.5  # share of energy beyond which no rank is told


@dataclass(frozen=True)
class DeltaSpectrum:
    """Singular values s of one model's delta of a matrix.

    Attributes:
        effective_rank: (sum s^2)^2 / sum s^4, the participation ratio: r for r equal singular values.
        stable_rank: sum s^2 / s_1^2.
        rank: the fewest singular values that leave white noise, of no more energy than rounding to the model's dtype
            adds; None if WIDTH are too few, or if most of the delta may be rounding.
        energy: share of sum s^2 in the first RANKS singular values.
    """

    effective_rank: float
    stable_rank: float
    rank: int | None
    energy: tuple[float, ...]


@dataclass(frozen=True)
class MatrixSpectra:
    """Of one matrix in all models.

    Attributes:
        models: None for a delta that is zero.
        left, right: of each pair, |U_i^T U_j|^2 / k and |V_i^T V_j|^2 / k over the k leading singular vectors: 1 for
            equal subspaces, `chance` (mean over the pairs and sides) for random ones. Models interfere where both are
            large; LoRAs whose A began with the same random numbers share the right side alone.
        interference: singular task interference of all models, |(U^T U - I) S (V^T V - I)|_1 over the k leading
            singular vectors of each (Gargiulo et al. 2024, arXiv:2412.00081), divided by the sum of S.
        pair_interference: the same of each pair.
    """

    models: tuple[DeltaSpectrum | None, ...]
    left: tuple[float | None, ...]
    right: tuple[float | None, ...]
    chance: float | None
    interference: float | None
    pair_interference: tuple[float | None, ...]


@dataclass(frozen=True)
class _Leading:
    """The largest singular values and vectors: u (rows, k), s (k), v (columns, k)."""

    u: Tensor
    s: Tensor
    v: Tensor

    def first(self, k: int) -> _Leading:
        return _Leading(self.u[:, :k], self.s[:k], self.v[:, :k])


def spectra(reader: SourceReader, refs: Sequence[TensorRef], rounding: Sequence[float], seed: int) -> MatrixSpectra:
    """Of a matrix; refs[0] is the base.

    Args:
        rounding: of each model, the share of |d|^2 that rounding explains; see DeltaMeasures.
        seed: of the random vectors, together with the tensor's name.
    """
    base = read_matrix(reader, refs[0])
    found: list[DeltaSpectrum | None] = []
    leading: list[_Leading | None] = []
    for ref, noise in zip(refs[1:], rounding, strict=True):
        delta = read_matrix(reader, ref).sub_(base)
        one, most = spectrum(delta, noise, f"{seed}\0{refs[0].name}")
        found.append(one)
        leading.append(most.first(SHARED) if most is not None else None)
    pairs = [(leading[i], leading[j]) for i, j in pairs_of(len(leading))]
    known = [(a, b) for a, b in pairs if a is not None and b is not None]
    return MatrixSpectra(
        models=tuple(found),
        left=tuple(None if a is None or b is None else overlap(a.u, b.u) for a, b in pairs),
        right=tuple(None if a is None or b is None else overlap(a.v, b.v) for a, b in pairs),
        chance=sum(_chance(a, b) for a, b in known) / len(known) if known else None,
        interference=interference([each for each in leading if each is not None]),
        pair_interference=tuple(None if a is None or b is None else interference([a, b]) for a, b in pairs),
    )


def read_matrix(reader: SourceReader, ref: TensorRef) -> Tensor:
    """(rows, columns) float32; of more than LIMIT numbers, rows at equal distances."""
    columns = ref.shape[-1]
    rows = ref.size // columns
    step = -(-ref.size // LIMIT)
    if step == 1:
        values = np.empty(ref.size, np.float32)
        reader.read_values(ref, 0, values)
        return torch.from_numpy(values.reshape(rows, columns))
    taken = range(0, rows, step)
    matrix = np.empty((len(taken), columns), np.float32)
    for place, row in enumerate(taken):
        reader.read_values(ref, row * columns, matrix[place])
    return torch.from_numpy(matrix)


def spectrum(delta: Tensor, rounding: float, key: str) -> tuple[DeltaSpectrum | None, _Leading | None]:
    """delta (rows, columns) float32 -> its spectrum and its largest singular vectors; None if it is zero."""
    total = float(torch.linalg.vector_norm(delta, dtype=torch.float64) ** 2)
    if total == 0.0:
        return None, None
    width = WIDTH + _OVERSAMPLING
    if 2 * width >= min(delta.shape):
        leading = _Leading(*(part.float() for part in thin_svd(delta.double())))
        tail = 0.0
    else:
        leading, tail = _sketch(delta, width, key)
    squares = leading.s.double() ** 2
    energy = torch.cumsum(squares, 0) / total
    found = DeltaSpectrum(
        effective_rank=min(float(min(delta.shape)), total**2 / (float((squares**2).sum()) + tail)),
        stable_rank=total / float(squares[0]),
        rank=_rank((squares / total).tolist(), rounding, tuple(delta.shape)),
        energy=tuple(min(1.0, float(energy[min(r, len(energy)) - 1])) for r in RANKS),
    )
    return found, leading


def _rank(shares: Sequence[float], rounding: float, shape: tuple[int, ...]) -> int | None:
    """The rank under the noise; see DeltaSpectrum.

    White noise of variance v has no singular value beyond sqrt(v) (sqrt(rows) + sqrt(columns)) (Marchenko, Pastur
    1967). Rounding is not quite white, as rows differ in size, so a gap counts too.

    Args:
        shares: of the singular values in the energy, the largest first.
    """
    if rounding > _MOST_NOISE:
        return None
    edge = (math.sqrt(shape[0]) + math.sqrt(shape[1])) ** 2 / math.prod(shape)
    left = 1.0
    for rank, share in enumerate(shares[: min(WIDTH, min(shape) - 1)], 1):
        left -= share
        following = shares[rank] if rank < len(shares) else 0.0
        is_noise = following <= max(_TOLERANCE**2 * left * edge, share / _GAP**2)
        if left <= _LEAST or (left <= _TOLERANCE * rounding and is_noise):
            return rank
    return None


def _sketch(delta: Tensor, width: int, key: str) -> tuple[_Leading, float]:
    """The `width` largest, and an estimate of the sum of the fourth powers of all others"""
    seed = xxhash.xxh3_64_intdigest(key.encode())
    random = np.random.Generator(np.random.Philox(seed)).standard_normal((delta.shape[1], width + _PROBES), np.float32)
    start = torch.from_numpy(random)
    image = delta @ start
    q = _orthonormal(image[:, :width])
    for _ in range(_POWERS):
        q = _orthonormal(delta @ _orthonormal(delta.T @ q))
    v, s, turn = torch.linalg.svd(delta.T @ q, full_matrices=False)
    leading = _Leading(q @ turn.T, s, v)
    probes = delta.T @ image[:, width:]
    rest = probes - leading.v @ (leading.v.T @ probes)
    return leading, float(torch.linalg.vector_norm(rest, dtype=torch.float64) ** 2) / _PROBES


def _orthonormal(matrix: Tensor) -> Tensor:
    return torch.linalg.qr(matrix).Q


def overlap(a: Tensor, b: Tensor) -> float:
    """Of the subspaces that orthonormal columns span, from 0 to 1"""
    return min(1.0, float((a.T @ b).square().sum()) / int(min(a.shape[1], b.shape[1])))


def _chance(a: _Leading, b: _Leading) -> float:
    """The overlap to expect of random subspaces of these dimensions"""
    return max(len(a.s), len(b.s)) * (1 / len(a.u) + 1 / len(a.v)) / 2


def interference(leading: Sequence[_Leading]) -> float | None:
    """Singular task interference over the sum of singular values; None for fewer than two models."""
    if len(leading) < 2:
        return None
    u, s, v = (torch.cat(parts, dim=-1).double() for parts in zip(*((e.u, e.s, e.v) for e in leading), strict=True))
    unit = torch.eye(len(s), dtype=torch.float64)
    left, right = u.T @ u - unit, v.T @ v - unit
    return float((left @ torch.diag(s) @ right).abs().sum() / s.sum())
