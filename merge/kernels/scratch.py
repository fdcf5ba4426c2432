"""Arrays that each thread reuses for all blocks; fresh pages would cost as much as the arithmetic."""

from __future__ import annotations

import threading
from typing import TypeVar

import numpy as np
import numpy.typing as npt

T = TypeVar("T", bound=np.generic)


class Scratch(threading.local):
    """Each thread's arrays by name, as large as the largest that was asked for."""

    def array(self, name: str, size: int, dtype: type[T] | np.dtype[T]) -> npt.NDArray[T]:
        """(size,) of what the last call with this name left"""
        held = getattr(self, name, None)
        if held is None or held.size < size:
            held = np.empty(size, dtype)
            setattr(self, name, held)
        view: npt.NDArray[T] = held[:size]
        return view
