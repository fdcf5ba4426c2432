"""The k-th largest magnitude of task vectors, exactly, without a sort and in bounded memory.

A float's bits without the sign are ordered like its magnitude, so the k-th value is found by histograms over a window
of those bits: a sample proposes a window, one pass counts what lies above it and inside it, and further passes narrow
it down to one value. A wrong proposal costs a pass, never the result. Of equal magnitudes, those of lowest flat index
stay; bfloat16 task vectors have very many equal magnitudes, so the place where they stop is found exactly too.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from merge.kernels.bits import as_f32, kernel, magnitude_bits, sub32
from merge.kernels.protocol import Block, FusedTensor

TOP = 1 << 31  # every magnitude is below
NOTHING = 0xFFFFFFFF  # a threshold that no magnitude reaches
BUCKETS = 1 << 14  # of one window: 3 arrays of them stay in the second-level cache
_COARSE_SHIFT = 15
_TILE = 2048


@dataclass(frozen=True, slots=True)
class Threshold:
    """An entry stays if its magnitude bits exceed `bits`, or equal them at a flat index below `cut`."""

    bits: int
    cut: int

    def at(self, index: int) -> int:
        """The least magnitude that stays at this flat index and up to `cut`."""
        return self.bits if index < self.cut else min(self.bits + 1, NOTHING)


KEEP_ALL = Threshold(0, TOP << 32)
KEEP_NONE = Threshold(NOTHING, 0)


def count_kept(density: float, size: int) -> int:
    """k = max(1, floor(density * n)); none for a density of zero."""
    return 0 if density <= 0 or size == 0 else max(1, int(density * size))


def largest(tensor: FusedTensor, keeps: Sequence[int]) -> list[Threshold]:
    """For each input (rows 1.. of the blocks, row 0 being the base), the threshold that keeps `keeps[i]` entries."""
    searches = [Search(model, keep, tensor.size) for model, keep in enumerate(keeps)]
    _propose([search for search in searches if not search.found], tensor)
    while pending := [search for search in searches if not search.found]:
        _narrow(pending, tensor)
    cuts = place_cuts([search for search in searches if search.quota is not None], tensor)
    return [search.threshold(cuts) for search in searches]


class Search:
    """The k-th largest magnitude of one input: known to lie in [low, high), with `above` entries at or over high."""

    def __init__(self, model: int, keep: int, size: int) -> None:
        self.model, self.keep, self.size = model, keep, size
        self.low, self.high = 0, TOP
        self.bits: int | None = None
        self.quota: int | None = None  # how many of the entries equal to `bits` stay; None: all
        if keep <= 0 or keep >= size:
            self.bits = NOTHING if keep <= 0 else 0

    @classmethod
    def settled(cls, model: int, bits: int, quota: int) -> Search:
        """A search whose value is known, and of whose equal entries `quota` stay."""
        search = cls(model, quota, quota)
        search.bits, search.quota = bits, quota
        return search

    @property
    def found(self) -> bool:
        return self.bits is not None

    @property
    def shift(self) -> int:
        return max(0, (self.high - self.low - 1).bit_length() - (BUCKETS.bit_length() - 1))

    def place(self, window: Window) -> None:
        """Takes what a pass counted over [low, high): moves or narrows the window, or finds the value."""
        if window.above >= self.keep:
            self.low, self.high = self.high, TOP
            return
        if window.above + int(window.counts.sum()) < self.keep:
            self.low, self.high = 0, self.low
            return
        from_top = window.above + np.cumsum(window.counts[::-1])
        bucket = BUCKETS - 1 - int(np.searchsorted(from_top, self.keep))
        least, most = int(window.least[bucket]), int(window.most[bucket])
        if least == most:
            count = int(window.counts[bucket])
            stay = self.keep - (int(from_top[BUCKETS - 1 - bucket]) - count)
            self.bits, self.quota = least, stay if stay < count else None
        else:
            self.low, self.high = least, most + 1

    def threshold(self, cuts: dict[int, int]) -> Threshold:
        assert self.bits is not None
        if self.bits == NOTHING:
            return KEEP_NONE
        return Threshold(self.bits, cuts.get(self.model, KEEP_ALL.cut))


class Window:
    """Counts of one input's magnitudes above a window and in its buckets, with least and greatest of each bucket."""

    def __init__(self) -> None:
        self.above = 0
        self.counts = np.zeros(BUCKETS, np.int64)
        self.least = np.full(BUCKETS, NOTHING, np.uint32)
        self.most = np.zeros(BUCKETS, np.uint32)

    def count(self, block: Block, row: int, search: Search) -> None:
        """Adds a block's task vector of one row, over the search's window."""
        low, high, shift = np.uint32(search.low), np.uint32(search.high), np.uint32(search.shift)
        self.above += _window_histogram(block.raw, row, low, high, shift, self.counts, self.least, self.most)

    def add(self, other: Window) -> None:
        self.above += other.above
        self.counts += other.counts
        np.minimum(self.least, other.least, out=self.least)
        np.maximum(self.most, other.most, out=self.most)


def _propose(searches: list[Search], tensor: FusedTensor) -> None:
    """Sets each window from a coarse histogram of a few chunks."""
    if not searches:
        return
    n_sampled = min(tensor.n_chunks, max(2, tensor.n_chunks // 32))
    chunks = sorted({i * tensor.n_chunks // n_sampled for i in range(n_sampled)})
    rows = tuple(search.model + 1 for search in searches)

    def update(histograms: npt.NDArray[np.int64], block: Block) -> None:
        for place, row in enumerate(rows):
            _coarse_histogram(block.raw, row, histograms[place])

    states = tensor.fold_chunks(lambda: np.zeros((len(rows), TOP >> _COARSE_SHIFT), np.int64), update, chunks)
    histograms = np.sum(states, axis=0)
    for search, histogram in zip(searches, histograms, strict=True):
        share = search.keep / search.size
        margin = 0.0 if len(chunks) == tensor.n_chunks else min(0.02, 0.25 * min(share, 1 - share))
        from_top = np.cumsum(histogram[::-1])
        first, last = np.searchsorted(from_top, np.array([share - margin, share + margin]) * from_top[-1])
        n_bins = len(histogram)
        search.low = max(0, n_bins - 1 - min(int(last), n_bins - 1)) << _COARSE_SHIFT
        search.high = (n_bins - min(int(first), n_bins - 1)) << _COARSE_SHIFT


def _narrow(searches: list[Search], tensor: FusedTensor) -> None:
    """One pass over the tensor for all inputs whose value is not found yet."""

    def update(windows: list[Window], block: Block) -> None:
        for search, window in zip(searches, windows, strict=True):
            window.count(block, search.model + 1, search)

    states = tensor.fold_chunks(lambda: [Window() for _ in searches], update)
    for place, search in enumerate(searches):
        total = states[0][place]
        for state in states[1:]:
            total.add(state[place])
        search.place(total)


def place_cuts(searches: list[Search], tensor: FusedTensor) -> dict[int, int]:
    """model -> flat index at which its entries equal to the threshold stop being kept."""
    if not searches:
        return {}
    targets = [(search.model + 1, np.uint32(search.bits or 0)) for search in searches]

    def count(block: Block) -> list[int]:
        return [count_equal(block.raw, row, bits) for row, bits in targets]

    totals = np.cumsum(np.array(tensor.map_chunks(count), dtype=np.int64), axis=0)
    cuts = {}
    for place, search in enumerate(searches):
        assert search.quota is not None
        chunk = int(np.searchsorted(totals[:, place], search.quota))
        before = int(totals[chunk - 1, place]) if chunk else 0
        row, bits = targets[place]
        wanted = search.quota - before
        (cut,) = tensor.map_chunks(
            lambda block, row=row, bits=bits, wanted=wanted: (
                block.start  # type: ignore[misc]
                + _place_of_equal(block.raw, row, bits, wanted)
            ),
            [chunk],
        )
        cuts[search.model] = cut + 1
    return cuts


@kernel
def _coarse_histogram(raw: Any, row: int, histogram: Any) -> None:
    for i in range(raw.shape[1]):
        histogram[magnitude_bits(as_f32(raw[row, i]) - as_f32(raw[0, i])) >> np.uint32(_COARSE_SHIFT)] += 1


@kernel
def _window_histogram(raw: Any, row: int, low: Any, high: Any, shift: Any, counts: Any, least: Any, most: Any) -> Any:
    """Counts magnitudes in buckets of [low, high); returns how many lie at or above high.

    Two loops over a tile, because the first one, without memory scatter, runs in vector registers, and few pass on.
    """
    tile = np.empty(_TILE, np.uint32)
    width = sub32(high, low)
    above = 0
    for start in range(0, raw.shape[1], _TILE):
        n = min(_TILE, raw.shape[1] - start)
        for i in range(n):
            magnitude = magnitude_bits(as_f32(raw[row, start + i]) - as_f32(raw[0, start + i]))
            tile[i] = sub32(magnitude, low)  # below the window: wraps to a large number
            above += magnitude >= high
        for i in range(n):
            place = tile[i]
            if place < width:
                bucket = place >> shift
                magnitude = place + low
                counts[bucket] += 1
                least[bucket] = min(least[bucket], magnitude)
                most[bucket] = max(most[bucket], magnitude)
    return above


@kernel
def count_equal(raw: Any, row: int, bits: Any) -> Any:
    count = 0
    for i in range(raw.shape[1]):
        count += magnitude_bits(as_f32(raw[row, i]) - as_f32(raw[0, i])) == bits
    return count


@kernel
def _place_of_equal(raw: Any, row: int, bits: Any, wanted: int) -> Any:
    """Index in the block of the wanted-th (from 1) entry whose magnitude equals bits."""
    for i in range(raw.shape[1]):
        if magnitude_bits(as_f32(raw[row, i]) - as_f32(raw[0, i])) == bits:
            wanted -= 1
            if wanted == 0:
                return i
    return raw.shape[1]
