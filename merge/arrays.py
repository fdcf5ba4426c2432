"""Names of array types and of what kernels take; shapes are in docstrings."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

F32 = npt.NDArray[np.float32]
F64 = npt.NDArray[np.float64]
I32 = npt.NDArray[np.int32]
I64 = npt.NDArray[np.int64]
U32 = npt.NDArray[np.uint32]
U64 = npt.NDArray[np.uint64]
Bools = npt.NDArray[np.bool_]
Array = npt.NDArray[Any]  # of any dtype
Raw = npt.NDArray[np.uint16] | F32  # as kernels read elements: bfloat16 as uint16, or float32
Numbers = tuple[float, ...]  # one for each model: the length is part of a kernel's type, so that loops over it unroll
