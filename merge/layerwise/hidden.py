"""Stores the hidden states of batches between two layers."""

from __future__ import annotations

import os
import tempfile
from types import TracebackType
from typing import TYPE_CHECKING, Any

import numpy as np

from merge.errors import OutputError

if TYPE_CHECKING:
    from torch import Tensor


class HiddenStates:
    """Arrays by number, float32; in memory up to a budget, the rest in a temporary file without a name.

    An array that is put again has the same shape.
    """

    def __init__(self, budget: int) -> None:
        self._left, self._end = budget, 0
        self._memory: dict[int, Any] = {}
        self._places: dict[int, tuple[int, tuple[int, ...]]] = {}  # in the file
        self._file: Any = None

    @property
    def spilled(self) -> bool:
        return self._file is not None

    def put(self, number: int, values: Tensor) -> None:
        if number not in self._places and (number in self._memory or values.nbytes <= self._left):
            self._left -= 0 if number in self._memory else values.nbytes
            self._memory[number] = values.clone()
            return
        if self._file is None:
            self._file = tempfile.TemporaryFile(prefix="merge-hidden-")  # noqa: SIM115
        if number not in self._places:
            self._places[number] = self._end, tuple(values.shape)
            self._end += values.nbytes
        data = np.ascontiguousarray(values.numpy()).data.cast("B")
        done = 0
        try:
            while done < len(data):
                done += os.pwrite(self._file.fileno(), data[done:], self._places[number][0] + done)
        except OSError as error:
            raise OutputError(
                f"{tempfile.gettempdir()}: hidden states cannot be kept there ({error.strerror}). Free some disk, "
                "point TMPDIR to another, or take less text."
            ) from error

    def get(self, number: int) -> Tensor:
        import torch

        if number in self._memory:
            return self._memory[number]
        place, shape = self._places[number]
        data = np.empty(shape, np.float32)
        view, done = data.data.cast("B"), 0
        while done < len(view):
            count = os.preadv(self._file.fileno(), [view[done:]], place + done)
            if count == 0:
                raise OutputError(f"{tempfile.gettempdir()}: hidden states that were kept there are cut short.")
            done += count
        return torch.from_numpy(data)

    def close(self) -> None:
        self._memory.clear()
        if self._file is not None:
            self._file.close()

    def __enter__(self) -> HiddenStates:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
