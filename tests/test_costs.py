"""What methods say that their kernels take is what they take."""

from __future__ import annotations

import threading
import tracemalloc
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
from memory_tensor import MemoryTensor

from merge.kernels.protocol import Block
from merge.methods import all_methods

CHUNK = 1 << 17
N = 3
MIB = 1 << 20


class _Tensor(MemoryTensor):
    """One thread's states, and blocks in a buffer of its own, as in the engine."""

    def __init__(self, raw: Any, shape: Sequence[int]) -> None:
        super().__init__(raw, CHUNK, shape)
        self.n_chunks = -(-self.size // self.chunk)
        self.buffer = np.empty(len(raw) * self.chunk, raw.dtype)

    def load(self, first: int, n: int = 1) -> Block:
        start, stop = first * self.chunk, min((first + n) * self.chunk, self.size)
        block = self.buffer[: len(self.raw) * (stop - start)].reshape(len(self.raw), -1)
        block[:] = self.raw[:, start:stop]
        return Block(start, block)

    def fold_chunks(
        self, start: Callable[[], Any], update: Callable[[Any, Block], None], chunks: Sequence[int] | None = None
    ) -> list[Any]:
        state = start()
        for chunk in range(self.n_chunks) if chunks is None else chunks:
            update(state, self.load(chunk))
        return [state]


@pytest.mark.parametrize("shape", [(96, 2048), (1 << 18,)])
@pytest.mark.parametrize("name", [name for name, method in all_methods().items() if method.fused])
def test_kernels_take_what_their_methods_say(name: str, shape: tuple[int, ...]) -> None:
    method = all_methods()[name]
    n = max(method.n_models[0], min(N, method.n_models[1] or N))
    rows = n + (method.inputs == "deltas")
    raw = (np.random.default_rng(0).standard_normal((rows, int(np.prod(shape)))) * 0.02).astype(np.float32)
    parameters: dict[str, Any] = {"_keys": tuple(range(n))} if method.random else {}
    for parameter in method.parameters:
        value = 0.5 if parameter.required or parameter.name == "density" else parameter.default
        value = "l1" if "l1" in parameter.choices else value  # of all ways to rescale it takes the most
        if value is not None:
            parameters[parameter.name] = (value,) * n if parameter.per_model else value
    tensor, peaks = _Tensor(raw, shape), []
    out = np.empty(tensor.chunk, np.float32)
    load = method.load_fused()
    assert load is not None

    def run() -> None:
        tracemalloc.start()
        combine = load(tensor, **method.keywords(parameters))
        for chunk in range(tensor.n_chunks):
            block = tensor.load(chunk)
            combine(block, out[: block.raw.shape[1]])
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()

    run()  # compiles
    thread = threading.Thread(target=run)  # with no arrays left from before
    thread.start()
    thread.join()
    said = method.scratch(shape, n, tensor.chunk)
    assert peaks[1] <= said + MIB // 4
    assert said <= 2 * peaks[1] + 10 * max(n, 3) * MIB  # histograms are as wide as the numbers are apart
