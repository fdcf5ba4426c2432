"""packed_columns: matrices that GPTQ and AWQ store transposed: codes of 2, 3, 4 or 8 bits, and scales of groups.

inputs: the codes, as words; the codes that mean zero, as words [groups, columns * bits / 32]; the scales [groups,
columns]; of GPTQ the group of each row, where `index` says so. The stored matrix has a row for each input of the layer
and a column for each output; the weight is its transpose. parameters:
    layout: "gptq" (codes are streams down the columns, [rows * bits / 32, columns]; of the zeros, 1 less is stored),
        "gptq_v2" (zeros as they are) or "awq" (codes are streams along the rows, [rows, columns * bits / 32], in
        AWQ_ORDER within a word; zeros likewise).
    bits; group: rows of one scale, where there is no index.

value = (code - zero) * scale; exact in float32 for scales of 16 bits.

A block of the weight's rows is a panel of stored columns: short pieces of every stored row. So panels are read that are
wider than a block, and the last ones are held.
Source: GPTQModel, nn_modules/qlinear/torch.py and utils/model.py (zeros); AutoAWQ, utils/packing_utils.py.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass
from typing import Any

import numpy as np

from merge.arrays import F32, I64, U32, Array
from merge.chunks import Chunks
from merge.dtypes import DTYPES
from merge.errors import CheckpointError
from merge.plan import Derived, TensorRef
from merge.sources import Fill, Read, rounding_to_steps
from merge.unpack import U8, by_units, byte_table, column_fields, look_up, row_fields

AWQ_ORDER = (0, 4, 1, 5, 2, 6, 3, 7)  # where values 0 .. 7 lie in a word, counted from its lowest bits
_PANEL = 4 << 20  # bytes of codes that are read at once ...
_NARROWEST = 256  # ... but as many columns at least: 1 KiB of each row of words
_KEPT = 2


@dataclass(frozen=True)
class _Panel:
    """Columns first .. of the stored matrix."""

    first: int
    codes: U32  # words, as they are stored
    zeros: F32  # (groups, columns)
    scales: F32  # (groups, columns)


def prepare(ref: Derived, read: Read) -> Fill:
    return _Columns(ref, read).fill


class _Columns:
    def __init__(self, ref: Derived, read: Read) -> None:
        self._ref, self._read = ref, read
        self._columns, self._rows = ref.shape
        self._bits, self._layout = ref.parameters["bits"], ref.parameters["layout"]
        self._table = None if self._bits == 3 else byte_table(np.arange(1 << self._bits, dtype=np.float32))
        self._width = _panel_columns(ref)
        self._index = _index(ref, read) if ref.parameters["index"] else None
        self._held: dict[int, _Panel] = {}
        self._lock = threading.Lock()

    def fill(self, start: int, out: F32) -> None:
        by_units(start, out, self._rows, self._ref.size, self._decode)

    def _decode(self, first: int, last: int, out: F32) -> None:
        """Rows first .. last - 1 of the weight, which are stored columns."""
        values = out.reshape(last - first, self._rows)
        place = first
        while place < last:
            panel = self._panel(place // self._width)
            stop = min(last, panel.first + self._width)
            self._part(panel, place, stop, values[place - first : stop - first])
            place = stop

    def _part(self, panel: _Panel, first: int, last: int, out: F32) -> None:
        begin, end = first - panel.first, last - panel.first
        if self._layout == "awq":
            low, high = begin // 8, -(-end // 8)
            out[:] = _awq_columns(panel.codes[:, low:high])[begin - low * 8 : end - low * 8]
        elif self._table is not None:  # words are turned while they are small
            look_up(
                self._table,
                np.ascontiguousarray(panel.codes[:, begin:end].T).view(np.uint8).reshape(-1),
                out.reshape(-1),
            )
        else:
            out[:] = np.ascontiguousarray(column_fields(panel.codes[:, begin:end], self._bits, self._rows).T)
        zeros, scales = panel.zeros[:, begin:end].T, panel.scales[:, begin:end].T
        with np.errstate(over="ignore", invalid="ignore"):  # counted later, with everything that is not finite
            if self._index is not None:
                out -= zeros[:, self._index]
                out *= scales[:, self._index]
                return
            groups = out.reshape(last - first, -1, self._ref.parameters["group"])
            groups -= zeros[:, :, None]
            groups *= scales[:, :, None]

    def _panel(self, number: int) -> _Panel:
        with self._lock:
            found = self._held.get(number)
            if found is None:
                while len(self._held) >= _KEPT:
                    del self._held[next(iter(self._held))]
                found = self._held[number] = self._load(number * self._width)
            return found

    def _load(self, first: int) -> _Panel:
        last = min(first + self._width, self._columns)
        codes, zeros, scales = self._ref.inputs[:3]
        packed = slice(first * self._bits // 32, -(-last * self._bits // 32))
        words = self._words(codes, packed if self._layout == "awq" else slice(first, last))
        return _Panel(
            first,
            words,
            self._zero_values(self._words(zeros, packed), last - first),
            self._slice(scales, slice(first, last), np.float32),
        )

    def _zero_values(self, words: U32, count: int) -> F32:
        """Words of zeros (groups, n) -> their values (groups, count)"""
        if self._layout == "awq":
            return np.ascontiguousarray(_awq_columns(words)[:count].T).astype(np.float32)
        if self._layout == "gptq" and self._bits != 3:
            # As one number: writers subtracted 1 from every field of a word so, and a borrow comes back.
            words = words + np.uint32(sum(1 << place for place in range(0, 32, self._bits)))
        found = row_fields(np.ascontiguousarray(words).view(np.uint8), self._bits, count)
        if self._layout == "gptq" and self._bits == 3:
            return ((found + 1) & 7).astype(np.float32)  # fields lie across words
        return found.astype(np.float32)

    def _words(self, ref: TensorRef, columns: slice) -> U32:
        return self._slice(ref, columns, np.int32).view(np.uint32)

    def _slice(self, ref: TensorRef, columns: slice, dtype: Any) -> Array:
        """Columns of a stored matrix: one read if they are all, else a piece of each row."""
        rows, width = ref.shape
        out: Array = np.empty((rows, columns.stop - columns.start), dtype)
        if out.shape[1] == width:
            self._read(ref, 0, out.reshape(-1))
        else:
            for row in range(rows):
                self._read(ref, row * width + columns.start, out[row])
        return out


def _awq_columns(words: U32) -> U8:
    """words (rows, n) -> (8 n, rows) codes of 4 bits"""
    turned = np.ascontiguousarray(words.T)
    codes = np.empty((len(turned), 8, turned.shape[1]), np.uint8)
    for place, shift in enumerate(AWQ_ORDER):
        codes[:, place] = (turned >> np.uint32(4 * shift)) & np.uint32(15)
    return codes.reshape(8 * len(turned), -1)


def _index(ref: Derived, read: Read) -> I64 | None:
    """The group of each row; None where it is what it would be without activation order."""
    part, groups = ref.inputs[3], ref.inputs[2].shape[0]
    found = np.empty(part.size, DTYPES[part.dtype].numpy_name)
    read(part, 0, found)
    if len(found) and not (found.min() >= 0 and found.max() < groups):
        raise CheckpointError(
            f"{part.file}: {part.name}: names groups {found.min()} to {found.max()}; {ref.name} has {groups}. "
            "Download the file again."
        )
    found = found.astype(np.int64)
    in_order = len(found) % groups == 0 and np.array_equal(found, np.arange(len(found)) // (len(found) // groups))
    return None if in_order else found


def _panel_columns(ref: Derived) -> int:
    columns, rows = ref.shape
    width = max(_NARROWEST, _PANEL * 8 // max(1, rows * ref.parameters["bits"]))
    return min(-(-columns // 32) * 32, int(width) // 32 * 32)  # 32 columns are whole words of zeros


def rounding(ref: Derived) -> float:
    return rounding_to_steps(ref.parameters["bits"], ref.parameters["group"])


def held_bytes(ref: Derived) -> int:
    """Panels; and of a chunk its codes, unpacked, and its values once more: not of whole rows, or with an index."""
    columns, rows = ref.shape
    width, groups = min(_panel_columns(ref), columns), ref.inputs[2].shape[0]
    panels = min(_KEPT, -(-columns // max(width, 1)))
    panel = width * (rows * int(ref.parameters["bits"]) // 8 + 16 * groups)
    chunk = Chunks.of(ref.shape).length + 2 * rows
    return panels * panel + (8 if ref.parameters["index"] else 7) * chunk + 8 * rows
