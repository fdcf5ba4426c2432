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
from merge.plan import Derived, Stored, TensorRef
from merge.sources import held_bytes, operation
from merge.sources.added import added
from merge.sources.fp4 import fp4
from merge.sources.gguf_rows import gguf_rows
from merge.sources.integers import integers
from merge.sources.joined import joined
from merge.sources.layer_parts import layer_parts
from merge.sources.lora import fold
from merge.sources.ordered import ordered
from merge.sources.rows import RowMap, rows_ref
from merge.sources.scaled import scaled
from merge.sources.token_rows import replace_rows
from merge.sources.view import strided

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


SHAPE = (512, 512)  # two chunks
FLOATS = Stored("w", "BF16", SHAPE, "f", 0)


def _derived(
    operation: str, inputs: tuple[TensorRef, ...], parameters: dict[str, Any], how: Any = "computed"
) -> Derived:
    return Derived("w", "BF16", SHAPE, operation, inputs, parameters, how)


def _floats(*shape: int) -> Stored:
    return Stored("part", "F32", shape, "f", 0)


def _rows() -> TensorRef:
    own = np.arange(SHAPE[0], dtype=np.int32)
    own[::3] = -1
    pairs: dict[int, list[tuple[int, int]] | None] = {int(row): [(0, 1), (1, 2)] for row in np.flatnonzero(own < 0)}
    pairs[0] = None  # padding: the mean of all rows
    return rows_ref("w", (FLOATS, FLOATS), RowMap.of(own, pairs), SHAPE)


def _codes(n: int) -> Stored:
    return Stored("codes", "U8", (n,), "f", 0)


def _words(*shape: int) -> Stored:
    return Stored("words", "I32", shape, "f", 0)


def _transposed(layout: str, codes: Stored, *index: Stored) -> Derived:
    parameters = {"layout": layout, "bits": 4, "group": 128, "index": bool(index)}
    return _derived("packed_columns", (codes, _words(4, 64), _floats(4, 512), *index), parameters)


CODES, N_WEIGHT = Stored("codes", "I8", SHAPE, "f", 0), SHAPE[0] * SHAPE[1]
PARTS = tuple((0, layer) for layer in (1, 0, 3, 2))
OPERATIONS: dict[str, TensorRef] = {
    "added": added(FLOATS, FLOATS, 0.5),
    "blockwise": _derived("blockwise", (_codes(N_WEIGHT // 2), _floats(N_WEIGHT // 64), _floats(16)), {"block": 64}),
    "blockwise, scales quantised": _derived(
        "blockwise",
        (_codes(N_WEIGHT // 2), _codes(N_WEIGHT // 64), _floats(16), _floats(N_WEIGHT // 16384), _floats(256)),
        {"block": 64, "nested_block": 256, "offset": 0.5},
    ),
    "fp4": fp4("w", "BF16", SHAPE, _codes(N_WEIGHT // 2), _codes(N_WEIGHT // 32), 32),
    "fp4, transposed": fp4("w", "BF16", SHAPE, _codes(N_WEIGHT // 2), _codes(N_WEIGHT // 32), 32, transposed=True),
    "integers": integers("w", "BF16", SHAPE, CODES, _floats(512), bits=8, block=(1, 512)),
    "integers, packed": integers(
        "w",
        "BF16",
        SHAPE,
        _codes(N_WEIGHT // 2),
        _floats(512, 4),
        bits=4,
        block=(1, 128),
        row_bytes=256,
        zeros=Stored("z", "I32", (64, 4), "f", 0),
        packed_zeros=True,
    ),
    "integers, in an order": integers(
        "w", "BF16", SHAPE, CODES, _floats(512, 4), bits=8, block=(1, 128), index=Stored("i", "I32", (512,), "f", 0)
    ),
    "gguf_rows, 8 bits": gguf_rows("w", SHAPE, "f", 0, "Q8_0"),
    "gguf_rows, 4 bits": gguf_rows("w", SHAPE, "f", 0, "Q4_K"),
    "gguf_rows, heads": gguf_rows("w", SHAPE, "f", 0, "Q4_0", head=64),
    "joined": joined("w", [_floats(256, 512), _floats(256, 512)], SHAPE),
    "layer_parts": layer_parts("w", [FLOATS], 1, [4], PARTS),
    "lora": fold(FLOATS, _floats(16, 512), _floats(512, 16), 0.5, False, None),
    "lora, rows scaled": fold(FLOATS, _floats(16, 512), _floats(512, 16), 0.5, False, _floats(512)),
    "lora, columns scaled": fold(FLOATS, _floats(16, 512), _floats(512, 16), 0.5, True, _floats(512)),
    "low_rank": _derived("low_rank", (_floats(16, 512), _floats(512, 16)), {"scaling": 1.0}),
    "noisy": _derived("noisy", (FLOATS,), {"key": 1, "scale": 0.1}),
    "ordered, rows": ordered(FLOATS, Stored("o", "I64", (64,), "f", 0), 0),
    "ordered, columns": ordered(FLOATS, Stored("o", "I64", (64,), "f", 0), 1),
    "packed_columns, GPTQ": _transposed("gptq", _words(64, 512)),
    "packed_columns, in an order": _transposed("gptq", _words(64, 512), Stored("i", "I32", (512,), "f", 0)),
    "packed_columns, AWQ": _transposed("awq", _words(512, 64)),
    "part": _derived("part", (_floats(1024, 512),), {"start": 512}),
    "random": _derived("random", (), {"key": 1, "scale": 0.1, "distribution": "normal"}),
    "recast": _derived("recast", (_floats(*SHAPE),), {}),
    "reinitialised": _derived("reinitialised", (FLOATS,), {"key": 1, "neurons": 2, "axis": 0, "ratio": 0.5}),
    "rows": _rows(),
    "scaled": scaled(FLOATS, _floats(4, 4), (128, 128)),
    "token_rows": replace_rows(FLOATS, _floats(8, 512), tuple(range(8))),
    "view": strided(FLOATS, (1, 512)),
    "zeros": _derived("zeros", (), {}),
}


@pytest.mark.parametrize("name", OPERATIONS)
def test_operations_take_what_they_say(name: str) -> None:
    ref = OPERATIONS[name]
    assert isinstance(ref, Derived)

    def read(source: TensorRef, start: int, out: Any) -> None:
        if source.name == "o":
            out[:] = np.arange(start, start + len(out))
        else:
            out[:] = 0.5 if out.dtype.kind == "f" else 1

    def once() -> None:
        operation(ref).prepare(ref, read)(0, out)

    out = np.empty(CHUNK, np.float32)
    once()  # compiles
    tracemalloc.start()
    try:
        before, _ = tracemalloc.get_traced_memory()
        once()
        taken = tracemalloc.get_traced_memory()[1] - before
    finally:
        tracemalloc.stop()
    said = held_bytes(ref)
    assert taken <= said + (64 << 10)
    assert said <= 3 * taken + MIB
