"""Fills the parameters of an empty model from stored tensors when they are needed."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from merge.architecture.loaded import Piece
from merge.arrays import F32
from merge.checkpoint.reader import SourceReader
from merge.dtypes import DTYPES
from merge.plan import TensorRef

if TYPE_CHECKING:
    from torch import Tensor
    from torch.nn import Module

EXPERT_BYTES = 256 << 20  # experts of a layer that take more float32 bytes than this are read one by one


@dataclass(frozen=True, eq=False)
class ModelParameter:
    """A parameter or stored buffer of a model.

    Attributes:
        names: in the model; several if it is tied, that under which it is stored first.
        places: (module, attribute) that hold it.
        empty: what they hold while it is not in memory.
        pieces: what it is read from; () if the checkpoint does not have it.
    """

    names: tuple[str, ...]
    places: tuple[tuple[Module, str], ...]
    empty: Any
    pieces: tuple[Piece, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.empty.shape)

    @property
    def is_plain(self) -> bool:
        """Whether it has the rows of one stored tensor."""
        return len(self.pieces) == 1 and self.pieces[0] == Piece(self.pieces[0].tensor, 0, 0, (*self.shape, 1)[0])

    @property
    def by_expert(self) -> bool:
        """Whether its module takes its matrices one at a time, and all together are large."""
        experts = hasattr(
            self.places[0][0], "_is_expert_parallel"
        )  # which transformers' use_experts_implementation sets
        return experts and len(self.shape) == 3 and are_large([self])

    @property
    def nbytes(self) -> int:
        """Bytes in memory while it is loaded."""
        return 4 * (math.prod(self.shape[1:]) if self.by_expert else self.empty.numel())


def are_large(slots: Sequence[ModelParameter]) -> bool:
    """Whether experts are read one by one."""
    n_bytes: int = sum(4 * slot.empty.numel() for slot in slots)
    return n_bytes > EXPERT_BYTES


class LayerWeights:
    """Loads values into a model's parameters, and frees them.

    Attributes:
        slots: by every name that the model has for them.
        held, most: bytes of weights in memory, now and at most so far.
    """

    def __init__(
        self,
        model: Module,
        pieces: Mapping[str, tuple[Piece, ...]],
        tensors: Mapping[str, TensorRef],
        reader: SourceReader,
    ) -> None:
        self._tensors, self._reader = tensors, reader
        self.held = self.most = 0
        self.slots: dict[str, ModelParameter] = {}
        tied: dict[int, list[tuple[str, Any, str]]] = {}
        for prefix, module in model.named_modules(remove_duplicate=False):
            buffers = {k: v for k, v in module._buffers.items() if k not in module._non_persistent_buffers_set}
            for key, value in (*module._parameters.items(), *buffers.items()):
                if value is not None:
                    tied.setdefault(id(value), []).append((f"{prefix}.{key}" if prefix else key, module, key))
        for places in tied.values():
            names = sorted((name for name, _, _ in places), key=lambda name: name not in pieces)
            held = tuple((module, key) for _, module, key in places)
            slot = ModelParameter(tuple(names), held, getattr(*held[0]), pieces.get(names[0], ()))
            self.slots.update(dict.fromkeys(names, slot))

    @property
    def all(self) -> tuple[ModelParameter, ...]:
        """Each slot once."""
        return tuple(dict.fromkeys(self.slots.values()))

    def load(self, slots: Iterable[ModelParameter]) -> None:
        import torch

        for slot in slots:
            self._count(slot.nbytes)
            if slot.by_expert:
                for module, key in slot.places:
                    module.__dict__[key] = _Matrices(self, slot)  # found before the parameter of this name
                continue
            self._place(
                slot, self._values(slot) if self._is_float(slot) else torch.from_numpy(self._whole_numbers(slot))
            )

    def drop(self, slots: Iterable[ModelParameter]) -> None:
        for slot in slots:
            self._count(-slot.nbytes)
            for module, key in slot.places:
                module.__dict__.pop(key, None)
            self._place(slot, slot.empty)

    def _place(self, slot: ModelParameter, values: Tensor) -> None:
        from torch import nn

        for module, key in slot.places:
            if key in module._buffers:
                module._buffers[key] = values
            else:
                module._parameters[key] = nn.Parameter(values, requires_grad=False)

    def rows(self, slot: ModelParameter, start: int, stop: int) -> Tensor:
        """Rows start..stop of a plain matrix, or of a plain vector its elements, float32."""
        import torch

        columns = math.prod(slot.shape[1:])
        out = np.empty((stop - start) * columns, np.float32)
        self._read(slot.pieces[0].tensor, start * columns, out)
        return torch.from_numpy(out).view(stop - start, *slot.shape[1:])

    def rows_of(self, slot: ModelParameter, numbers: npt.NDArray[np.int64]) -> Tensor:
        """Rows of a plain matrix for sorted numbers, neighbours read together."""
        import torch

        runs = np.split(numbers, np.flatnonzero(np.diff(numbers) > 1) + 1)
        return torch.cat([self.rows(slot, int(run[0]), int(run[-1]) + 1) for run in runs])

    def matrix(self, slot: ModelParameter, expert: int) -> Tensor:
        """A stack's matrix for one expert: (*shape[1:])."""
        import torch

        out = np.empty(math.prod(slot.shape[1:]), np.float32)
        self._expert(slot, expert, out)
        return torch.from_numpy(out).view(slot.shape[1:])

    def borrow(self, values: Tensor) -> Tensor:
        """Counts values that stay for one batch only."""
        self.most = max(self.most, self.held + values.nbytes)
        return values

    def _values(self, slot: ModelParameter) -> Tensor:
        import torch

        out = np.empty(slot.empty.numel(), np.float32)
        if any(piece.stacked or piece.expert is not None for piece in slot.pieces):
            for expert, part in enumerate(np.split(out, slot.shape[0])):
                self._expert(slot, expert, part)
        else:
            columns = math.prod(slot.shape[1:])
            for piece in slot.pieces:
                part = out[piece.row * columns : (piece.row + piece.rows) * columns]
                self._read(piece.tensor, piece.start * columns, part)
        return torch.from_numpy(out).view(slot.shape)

    def _expert(self, slot: ModelParameter, expert: int, out: F32) -> None:
        """One matrix of a stack -> out, flat."""
        columns = math.prod(slot.shape[2:])
        for piece in slot.pieces:
            if piece.expert is None and not piece.stacked:
                self._read(piece.tensor, expert * len(out), out)
            elif piece.turned:
                turned = np.empty(len(out), np.float32)
                self._read(piece.tensor, expert * len(out), turned)
                out[:] = turned.reshape(columns, -1).T.reshape(-1)
            elif piece.stacked or piece.expert == expert:
                before = expert * self._tensors[piece.tensor].shape[1] if piece.stacked else 0
                part = out[piece.row * columns : (piece.row + piece.rows) * columns]
                self._read(piece.tensor, (before + piece.start) * columns, part)

    def _read(self, name: str, start: int, out: F32) -> None:
        self._reader.read_values(self._tensors[name], start, out)

    def _is_float(self, slot: ModelParameter) -> bool:
        return DTYPES[self._tensors[slot.pieces[0].tensor].dtype].is_float

    def _whole_numbers(self, slot: ModelParameter) -> npt.NDArray[Any]:
        ref = self._tensors[slot.pieces[0].tensor]
        out: npt.NDArray[Any] = np.empty(ref.size, DTYPES[ref.dtype].numpy_name)
        self._reader.read_into(ref, 0, out)
        return out.reshape(ref.shape)

    def _count(self, nbytes: int) -> None:
        self.held += nbytes
        self.most = max(self.most, self.held)


class _Matrices:
    """Stands in for a stacked parameter: its matrices are read on access."""

    def __init__(self, weights: LayerWeights, slot: ModelParameter) -> None:
        self._weights, self._slot = weights, slot

    def __getitem__(self, expert: Any) -> Any:
        return self._weights.matrix(self._slot, int(expert))
