"""The k-th largest magnitude of task vectors, exactly, without a sort and in bounded memory.

A float's bits without the sign are ordered like its magnitude, so the k-th value is found by histograms over a window
of those bits: a sample proposes a window, one pass counts what lies above it and inside it, and further passes narrow
it down to one value. A wrong proposal costs a pass, never the result. Of equal magnitudes, those of lowest flat index
stay; bfloat16 task vectors have very many equal magnitudes, so the place where they stop is found exactly too.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from merge.arrays import I64, U32, Raw
from merge.kernels.bits import Count, as_f32, count32, kernel, magnitude_bits, sub32
from merge.kernels.protocol import Block, Passes

TOP = 1 << 31  # every magnitude is below
NOTHING = 0xFFFFFFFF  # a threshold that no magnitude reaches
BUCKETS = 1 << 20  # of one window at the most: wide enough that one pass is usually all
_COARSE_SHIFT = 15
_SMALL = 1 << 14  # elements of a tensor for which sorting is quicker than histograms
_SAMPLED = 3  # of a sample's chunks each third entry is looked at; not a power of two, so in rows each column is
_COUNTED = 64  # chunks whose equal entries are counted before it is known whether more must be
_TILE = 2048
_GROUP = 8  # elements of a tile that are looked at only if one of them is in the window


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


def count_outliers(gamma: float, density: float, size: int) -> int:
    """floor(gamma * n) entries go from the top, fewer where the k that `density` keeps would not be left."""
    return min(int(gamma * size), size - count_kept(density, size))


def largest(tensor: Passes, keeps: Sequence[int], models: Sequence[int] | None = None) -> list[Threshold]:
    """For each input (rows 1.. of the blocks, row 0 being the base), the threshold that keeps `keeps[i]` entries.

    `models` says whose thresholds are wanted, where that is not one for each input in turn.
    """
    searches = [Search(i if models is None else models[i], keep, tensor.size) for i, keep in enumerate(keeps)]
    _find(searches, tensor)
    place_cuts([search for search in searches if search.quota is not None], tensor)
    return [search.threshold for search in searches]


def kth_bits(tensor: Passes, ks: Sequence[int]) -> list[int]:
    """Of the first input the k-th largest magnitude's bits, for each k from 1 to the tensor's size"""
    searches = [Search.of_kth(0, k, tensor.size) for k in ks]
    _find(searches, tensor)
    return [search.threshold.bits for search in searches]


def _find(searches: list[Search], tensor: Passes) -> None:
    if tensor.n_chunks == 1 and tensor.size <= _SMALL:
        _sort([search for search in searches if not search.found], tensor)
    _propose([search for search in searches if not search.found], tensor)
    while pending := [search for search in searches if not search.found]:
        _narrow(pending, tensor)


def _sort(searches: list[Search], tensor: Passes) -> None:
    """Finds the values of a tensor that is read and sorted at once."""
    rows = tuple(dict.fromkeys(search.model + 1 for search in searches))

    def magnitudes(block: Block) -> U32:
        found = np.empty((len(rows), block.raw.shape[1]), np.uint32)
        for place, row in enumerate(rows):
            _magnitudes(block.raw[0], block.raw[row], found[place])
        return found

    if rows:
        (found,) = tensor.map_chunks(magnitudes)
        found.sort(axis=1)
        for search in searches:
            search.take(found[rows.index(search.model + 1)])


class Search:
    """The k-th largest magnitude of one input: known to lie in [low, high), with `above` entries at or over high."""

    def __init__(self, model: int, keep: int, size: int) -> None:
        self.model, self.keep, self.size = model, keep, size
        self.low, self.high = 0, TOP
        self.bits: int | None = None
        self.quota: int | None = None  # how many of the entries equal to `bits` stay; None: all
        self.cut = KEEP_ALL.cut
        if keep <= 0 or keep >= size:
            self.bits = NOTHING if keep <= 0 else 0

    @classmethod
    def settled(cls, model: int, bits: int, quota: int) -> Search:
        """A search whose value is known, and of whose equal entries `quota` stay."""
        search = cls(model, quota, quota)
        search.bits, search.quota = bits, quota
        return search

    @classmethod
    def of_kth(cls, model: int, k: int, size: int) -> Search:
        """The value itself, even of the last: what keeps all entries would be satisfied with zero."""
        search = cls(model, k, size)
        search.bits = None
        return search

    @property
    def found(self) -> bool:
        return self.bits is not None

    @property
    def shift(self) -> int:
        """Values of one bucket, as a power of two."""
        return max(0, (self.high - self.low - 1).bit_length() - (BUCKETS.bit_length() - 1))

    @property
    def n_buckets(self) -> int:
        return ((self.high - self.low - 1) >> self.shift) + 1

    def place(self, window: BitWindow) -> None:
        """Takes what a pass counted over [low, high): moves or narrows the window, or finds the value."""
        if window.above >= self.keep:
            self.low, self.high = self.high, TOP
            return
        bucket, stay = _bucket_from_top(window.counts, self.keep - window.above)
        if bucket < 0:
            self.low, self.high = 0, self.low
        elif self.shift == 0:
            self.bits = self.low + bucket
            self.quota = stay if stay < window.counts[bucket] else None
        else:
            low = self.low + (bucket << self.shift)
            self.low, self.high = low, min(low + (1 << self.shift), self.high)

    def take(self, ordered: U32) -> None:
        """Finds the value in all magnitudes, in rising order."""
        value = ordered[-self.keep]
        first, end = (int(np.searchsorted(ordered, value, side)) for side in ("left", "right"))
        stay = self.keep - (len(ordered) - end)
        self.bits, self.quota = int(value), stay if stay < end - first else None

    @property
    def threshold(self) -> Threshold:
        assert self.bits is not None
        return KEEP_NONE if self.bits == NOTHING else Threshold(self.bits, self.cut)


class BitWindow:
    """Counts of one input's magnitudes above a search's window, and in its buckets."""

    def __init__(self, search: Search) -> None:
        self.above = 0
        self.counts: U32 | I64 = (
            np.zeros(search.n_buckets, np.uint32) if search.size < 1 << 32 else np.zeros(search.n_buckets, np.int64)
        )

    def count(self, block: Block, row: int, search: Search) -> None:
        """Adds a block's task vector of one row, over the search's window."""
        low, high, shift = np.uint32(search.low), np.uint32(search.high), np.uint32(search.shift)
        self.above += _window_histogram(block.raw[0], block.raw[row], low, high, shift, self.counts)

    def add(self, other: BitWindow) -> None:
        self.above += other.above
        self.counts += other.counts


def _propose(searches: list[Search], tensor: Passes) -> None:
    """Sets each window from a coarse histogram of a few chunks."""
    if not searches:
        return
    n_sampled = min(tensor.n_chunks, max(8, tensor.n_chunks // 16))
    chunks = sorted({i * tensor.n_chunks // n_sampled for i in range(n_sampled)})
    step = 1 if len(chunks) == tensor.n_chunks else _SAMPLED
    rows = tuple(dict.fromkeys(search.model + 1 for search in searches))

    def update(histograms: I64, block: Block) -> None:
        for place, row in enumerate(rows):
            _coarse_histogram(block.raw[0], block.raw[row], step, histograms[place])

    states = tensor.fold_chunks(lambda: np.zeros((len(rows), TOP >> _COARSE_SHIFT), np.int64), update, chunks)
    histograms = dict(zip(rows, np.sum(states, axis=0), strict=True))
    for search in searches:
        histogram = histograms[search.model + 1]
        share = search.keep / search.size
        margin = 0.0 if len(chunks) == tensor.n_chunks else min(0.006, 0.25 * min(share, 1 - share))
        from_top = np.cumsum(histogram[::-1])
        first, last = np.searchsorted(from_top, np.array([share - margin, share + margin]) * from_top[-1])
        n_bins = len(histogram)
        search.low = max(0, n_bins - 1 - min(int(last), n_bins - 1)) << _COARSE_SHIFT
        search.high = (n_bins - min(int(first), n_bins - 1)) << _COARSE_SHIFT


def _narrow(searches: list[Search], tensor: Passes) -> None:
    """One pass over the tensor for all inputs whose value is not found yet."""

    def update(windows: list[BitWindow], block: Block) -> None:
        for search, window in zip(searches, windows, strict=True):
            window.count(block, search.model + 1, search)

    states = tensor.fold_chunks(lambda: [BitWindow(search) for search in searches], update)
    for place, search in enumerate(searches):
        total = states[0][place]
        for state in states[1:]:
            total.add(state[place])
        search.place(total)


def place_cuts(searches: list[Search], tensor: Passes) -> None:
    """Finds the flat indices at which entries equal to the threshold stop being kept.

    Chunks are counted in order, and no further than to where the last search's quota is reached.
    """
    left = [search.quota or 0 for search in searches]
    for first in range(0, tensor.n_chunks, _COUNTED):
        open_ = [place for place, quota in enumerate(left) if quota > 0]
        if not open_:
            return
        chunks = range(first, min(first + _COUNTED, tensor.n_chunks))
        targets = [(searches[place].model + 1, np.uint32(searches[place].bits or 0)) for place in open_]

        def count(block: Block, targets: list[tuple[int, np.uint32]] = targets) -> list[int]:
            return [int(count_equal(block.raw, row, bits)) for row, bits in targets]

        totals = np.cumsum(np.array(tensor.map_chunks(count, chunks), dtype=np.int64), axis=0)
        for column, place in enumerate(open_):
            here = int(np.searchsorted(totals[:, column], left[place]))
            if here < len(chunks):
                wanted = left[place] - (int(totals[here - 1, column]) if here else 0)
                searches[place].cut = 1 + _find_equal(tensor, chunks[here], *targets[column], wanted)
            left[place] -= int(totals[-1, column])


def _find_equal(tensor: Passes, chunk: int, row: int, bits: np.uint32, wanted: int) -> int:
    """Flat index of the wanted-th (from 1) entry of a chunk whose magnitude equals bits"""

    def place(block: Block) -> int:
        return block.start + int(_place_of_equal(block.raw, row, bits, wanted))

    (found,) = tensor.map_chunks(place, [chunk])
    return found


@kernel
def _magnitudes(base: Raw, model: Raw, out: U32) -> None:
    for i in range(len(base)):
        out[i] = magnitude_bits(as_f32(model[i]) - as_f32(base[i]))


@kernel
def _coarse_histogram(base: Raw, model: Raw, step: int, histogram: I64) -> None:
    for i in range(0, len(base), step):
        histogram[magnitude_bits(as_f32(model[i]) - as_f32(base[i])) >> np.uint32(_COARSE_SHIFT)] += 1


@kernel
def _window_histogram(
    base: Raw, model: Raw, low: np.uint32, high: np.uint32, shift: np.uint32, counts: U32 | I64
) -> int:
    """base, model (n,): counts magnitudes of model - base in buckets of [low, high); returns how many are at or above.

    Tile by tile, so that all but the few entries in the window are dealt with in vector registers: first the
    magnitudes less `low` (below the window they wrap to large numbers), then how many are above, then the least of each
    group of entries, which says whether the group needs a look. Hits go to lists without a branch, half of which would
    be guessed wrong. A tile is a slice, because LLVM does not vectorise an index that numba cannot show to be positive.
    """
    tile = np.empty(_TILE, np.uint32)
    n_groups = _TILE // _GROUP
    least = np.empty(n_groups, np.uint32)
    hit = np.empty(n_groups, np.uint32)
    inside = np.empty(_TILE, np.uint32)
    width = sub32(high, low)
    above = 0
    for start in range(0, len(base), _TILE):
        b, x = base[start : start + _TILE], model[start : start + _TILE]
        if len(b) < _TILE:
            tile[:] = np.uint32(0xFFFFFFFF)
        for i in range(len(b)):
            tile[i] = sub32(magnitude_bits(as_f32(x[i]) - as_f32(b[i])), low)
        here = np.uint32(0)
        for i in range(_TILE):
            here = count32(here, (tile[i] >= width) & (tile[i] < np.uint32(0x80000000)))
        above += int(here)
        for g in range(n_groups):
            least[g] = tile[g]  # `least[:] = ...` takes numba two seconds more
        for k in range(1, _GROUP):
            part = tile[k * n_groups : (k + 1) * n_groups]
            for g in range(n_groups):
                least[g] = min(least[g], part[g])
        n_hit = 0
        for g in range(n_groups):
            hit[n_hit] = g
            n_hit += least[g] < width
        n_inside = 0
        for h in range(n_hit):
            for k in range(_GROUP):
                place = tile[k * n_groups + hit[h]]
                inside[n_inside] = place
                n_inside += place < width
        for i in range(n_inside):
            counts[inside[i] >> shift] += 1
    return above


@kernel
def _bucket_from_top(counts: U32 | I64, keep: int) -> tuple[int, int]:
    """(bucket that holds the keep-th entry counted from the last bucket, how many of that bucket are among the keep)"""
    for bucket in range(len(counts) - 1, -1, -1):
        if counts[bucket] >= keep:
            return bucket, keep
        keep -= counts[bucket]
    return -1, keep


@kernel
def count_equal(raw: Raw, row: int, bits: np.uint32) -> Count:
    count = np.uint32(0)
    for i in range(raw.shape[1]):
        count = count32(count, magnitude_bits(as_f32(raw[row, i]) - as_f32(raw[0, i])) == bits)
    return count


@kernel
def _place_of_equal(raw: Raw, row: int, bits: np.uint32, wanted: int) -> int:
    """Index in the block of the wanted-th (from 1) entry whose magnitude equals bits."""
    for i in range(raw.shape[1]):
        if magnitude_bits(as_f32(raw[row, i]) - as_f32(raw[0, i])) == bits:
            wanted -= 1
            if wanted == 0:
                return i
    return int(raw.shape[1])
