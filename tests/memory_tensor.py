"""What methods are tested on: tensors in memory in place of files, and both ways to run a method over them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from merge.kernels.protocol import Block
from merge.methods import Method

Floats = npt.NDArray[np.float32]


class MemoryTensor:
    """merge.kernels.protocol.FusedTensor over raw (source, n), in chunks of any length, with two workers' states.

    As in the engine, a chunk is whole rows, at least one, unless the tensor is a vector.
    """

    def __init__(self, raw: npt.NDArray[Any], chunk: int, shape: Sequence[int] | None = None) -> None:
        self.raw = raw
        self.shape = tuple(raw.shape[1:] if shape is None else shape)
        row = max(1, self.shape[-1]) if len(self.shape) > 1 else 1
        self.chunk = max(1, chunk // row) * row
        self.size = raw.shape[1]
        self.n_chunks = -(-self.size // chunk)

    def load(self, first: int, n: int = 1) -> Block:
        start, stop = first * self.chunk, min((first + n) * self.chunk, self.size)
        return Block(start, np.ascontiguousarray(self.raw[:, start:stop]))

    def map_chunks(self, function: Callable[[Block], Any], chunks: Sequence[int] | None = None) -> list[Any]:
        return [function(self.load(chunk)) for chunk in (range(self.n_chunks) if chunks is None else chunks)]

    def fold_chunks(
        self, start: Callable[[], Any], update: Callable[[Any, Block], None], chunks: Sequence[int] | None = None
    ) -> list[Any]:
        states = [start(), start()]
        for place, chunk in enumerate(range(self.n_chunks) if chunks is None else chunks):
            update(states[place % 2], self.load(chunk))
        return states

    def sum_chunks(self, function: Callable[[Any, Any], None], n: int) -> list[float]:
        totals = np.zeros(n)
        for chunk in range(self.n_chunks):
            out = np.empty(n)
            function(self.load(chunk).raw, out)
            totals += out
        return totals.tolist()


def to_raw(values: npt.ArrayLike, dtype: str) -> npt.NDArray[Any]:
    """(source, n) -> as kernels read it: float32, or bfloat16 as uint16, rounded to nearest even"""
    import torch

    single = np.ascontiguousarray(values, np.float32)
    return torch.from_numpy(single).to(torch.bfloat16).view(torch.uint16).numpy() if dtype == "BF16" else single


def widened(raw: npt.NDArray[Any]) -> Floats:
    return (raw.astype(np.uint32) << np.uint32(16)).view(np.float32) if raw.dtype == np.uint16 else raw


def run_fused(
    method: Method,
    raw: npt.NDArray[Any],
    chunk: int,
    per_block: int = 1,
    shape: Sequence[int] | None = None,
    **parameters: Any,
) -> Floats:
    """raw (source, n), the base first where the method has one -> the merged tensor (n,) float32"""
    fused = method.load_fused()
    assert fused is not None
    tensor = MemoryTensor(raw, chunk, shape)
    combine = fused(tensor, **parameters)
    out = np.full(tensor.size, np.nan, np.float32)
    for first in range(0, tensor.n_chunks, per_block):
        block = tensor.load(first, per_block)
        combine(block, out[block.start : block.start + block.raw.shape[1]])
    return out


def has_base(method: Method, n_sources: int, parameters: dict[str, Any]) -> bool:
    """Whether the first of the sources is a base that task vectors start from."""
    optional = method.inputs == "either" and n_sources > len(parameters["weight"])
    return method.inputs == "deltas" or optional


def run_reference(
    method: Method, raw: npt.NDArray[Any], shape: Sequence[int] | None = None, **parameters: Any
) -> Floats:
    """The same by the method's definition in torch."""
    import torch

    values = torch.from_numpy(widened(raw)).view(len(raw), *(raw.shape[1:] if shape is None else shape))
    if has_base(method, len(raw), parameters):
        merged = values[0] + method.reference(values[1:] - values[0], **parameters)
    else:
        merged = method.reference(values, **parameters)
    result: Floats = merged.to(torch.float32).reshape(-1).numpy()
    return result
