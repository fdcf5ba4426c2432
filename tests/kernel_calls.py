"""Every kernel with the arguments that methods and commands give it: these are run, and what kernels get is kept."""

from __future__ import annotations

import importlib
import pkgutil
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numba
import numpy as np
import numpy.typing as npt
from memory_tensor import MemoryTensor
from numba.core.registry import CPUDispatcher

import merge.kernels
from merge.kernels.protocol import Block
from merge.methods import Method, all_methods

N = 1 << 17  # elements
SHAPE = (64, 2048)
N_MODELS = 3
# Names of arguments that say how many elements a call is about, most telling first; (source, n) those in _SOURCES.
_TELLING = ("raw", "base", "wide", "values", "keys", "ordered", "out", "counts")
_SOURCES = ("raw", "sparse")


@dataclass
class Call:
    """One kernel with arguments of certain types: those of the call about most elements."""

    kernel: Any
    arguments: tuple[Any, ...]
    types: Any  # as numba has compiled it
    compile_seconds: float  # CPU time of the first call

    @property
    def shown(self) -> str:
        """Numbers of its first array, with their number of sources"""
        first = next(value for value in self.arguments if isinstance(value, np.ndarray))
        name = "bf16" if first.dtype == np.uint16 else str(first.dtype)
        return f"{name} x{len(first)}" if "raw" in self.kernel.py_func.__code__.co_varnames[:1] else name

    def cpu_seconds(self) -> float:
        began = time.thread_time()
        self.kernel(*self.arguments)
        return time.thread_time() - began


def key_of(kernel: Any) -> str:
    return f"{kernel.py_func.__module__.removeprefix('merge.kernels.')}.{kernel.py_func.__name__}"


def kernels() -> dict[str, Any]:
    """All jitted functions of merge/kernels by name"""
    found = {}
    for info in pkgutil.iter_modules(merge.kernels.__path__, "merge.kernels."):
        for value in vars(importlib.import_module(info.name)).values():
            if isinstance(value, CPUDispatcher):
                found[key_of(value)] = value
    return found


def elements(kernel: Any, arguments: tuple[Any, ...]) -> int:
    """How many elements a call is about"""
    named = dict(zip(kernel.py_func.__code__.co_varnames, arguments, strict=False))
    for name in _TELLING:
        value = named.get(name)
        if isinstance(value, np.ndarray):
            return max(1, value.shape[1] if name in _SOURCES else value.size)
    return 1


def calls_of(names: Collection[str] = ()) -> list[Call]:
    """Runs what is named, or everything, and gives what came to kernels that take arrays."""
    with _kept() as kept:
        for name, run in runs():
            if not names or name in names:
                run()
    return [call for call in kept.values() if any(isinstance(value, np.ndarray) for value in call.arguments)]


def unused() -> list[str]:
    """Kernels that nothing of what ran has compiled, neither by themselves nor inside others"""
    return [name for name, kernel in kernels().items() if not kernel.signatures]


@contextmanager
def _kept() -> Iterator[dict[Any, Call]]:
    kept: dict[Any, Call] = {}
    plain = CPUDispatcher.__call__

    def call(self: Any, *arguments: Any) -> Any:
        if not self.py_func.__module__.startswith("merge.kernels."):
            return plain(self, *arguments)
        types = tuple(numba.typeof(value) for value in arguments)
        held = kept.get((self, types))
        if held is not None and elements(self, arguments) <= elements(self, held.arguments):
            return plain(self, *arguments)
        copies = tuple(value.copy() if isinstance(value, np.ndarray) else value for value in arguments)
        began = time.thread_time()
        result = plain(self, *arguments)
        seconds = time.thread_time() - began if held is None else held.compile_seconds
        kept[self, types] = Call(self, copies, types if types in self.overloads else self.signatures[-1], seconds)
        return result

    CPUDispatcher.__call__ = call
    try:
        yield kept
    finally:
        CPUDispatcher.__call__ = plain


def runs() -> Iterator[tuple[str, Callable[[], Any]]]:
    """All that can be run: methods, in each of their ways, and modules of kernels that methods do not use"""
    for name, method in all_methods().items():
        if method.fused:
            for parameters in _variants(method):
                yield name, lambda method=method, parameters=parameters: _run(method, parameters)  # type: ignore[misc]
    yield from _others()


def _variants(method: Method) -> Iterator[dict[str, Any]]:
    """The parameters of a method, then those with each choice and switch turned in its turn"""
    plain: dict[str, Any] = {"_keys": tuple(range(N_MODELS))} if method.random else {}
    for parameter in method.parameters:
        value = 0.5 if parameter.required or parameter.name in ("density", "select_topk") else parameter.default
        value = {"gamma": 0.01, "epsilon": 0.1 if parameter.per_model else 1e-5}.get(parameter.name, value)
        if value is not None:
            plain[parameter.name] = (value,) * N_MODELS if parameter.per_model else value
    yield plain
    for parameter in method.parameters:
        others = [choice for choice in parameter.choices if choice != parameter.default]
        if isinstance(parameter.default, bool):
            others.append(not parameter.default)
        for value in others:
            yield plain | {parameter.name: value}


def _run(method: Method, parameters: dict[str, Any]) -> None:
    least, most = method.n_models
    n = max(least, min(N_MODELS, most or N_MODELS))
    parameters = {
        name: value[:n] if isinstance(value, tuple) and name != "_threshold" else value
        for name, value in parameters.items()
    }
    fused = method.load_fused()
    assert fused is not None
    for rows in {"models": (n,), "deltas": (n + 1,), "either": (n, n + 1)}[method.inputs]:
        random = np.random.default_rng(0)
        values = np.repeat(random.standard_normal((1, N)) * 0.02, rows, 0)
        values[1:] += random.standard_normal((rows - 1, N)) * 1e-3
        tensor = MemoryTensor(_bf16(values), N, SHAPE)
        combine = fused(tensor, **method.keywords(parameters))
        combine(tensor.load(0), np.empty(N, np.float32))


def _bf16(values: npt.NDArray[Any]) -> npt.NDArray[np.uint16]:
    """Cut off, not rounded"""
    return (values.astype(np.float32).view(np.uint32) >> np.uint32(16)).astype(np.uint16)


def _others() -> Iterator[tuple[str, Callable[[], Any]]]:
    """What is not a method: encoding, differences, adapters, random numbers"""
    from merge.dtypes import DTYPES
    from merge.kernels import (
        deltas,
        difference,
        elementwise,
        encode,
        fold,
        functions,
        fusion,
        random,
        ranks,
        rotate,
        rounding,
        selection,
        spherical,
    )

    generator = np.random.default_rng(0)
    values = (generator.standard_normal(N) * 0.02).astype(np.float32)
    raw = _bf16(np.stack([values, values * 1.01, values * 0.99]))
    matrix, wide = values.reshape(SHAPE), values.astype(np.float64)
    rows, columns = SHAPE
    for dtype in ("BF16", "F16", "F8_E4M3", "F8_E5M2"):
        stored = np.empty(N, DTYPES[dtype].numpy_name)
        yield "encode", lambda dtype=dtype, stored=stored: encode.encode(values, dtype, stored)  # type: ignore[misc]
        yield "rounding", lambda dtype=dtype, stored=stored: rounding.rounding_sums(values, dtype, stored)  # type: ignore[misc]
    yield "encode", lambda: encode.count_nonfinite(raw[0])
    yield "difference", lambda: difference.difference_of(raw[:2], np.empty(5))
    yield "difference", lambda: difference.difference_of(raw, np.empty(10))
    layout, kept = deltas.DeltaLayout(2, 2), selection.KEEP_ALL
    block = Block(0, raw)
    yield "deltas", lambda: deltas.delta_sums(block, [[kept] * 2] * 2, 0.5, layout)
    yield "elementwise", lambda: elementwise.difference_sums(raw, 1)
    yield "spherical", lambda: spherical._sum_squares(raw, (0.5, 0.3, -0.8), np.empty(1))
    yield "spherical", lambda: spherical._column_sums(raw, 1, 0, columns)
    yield "spherical", lambda: spherical._combine_columns(raw, 1, 0, np.ones((2, columns)), np.empty(N, np.float32))
    yield "ranks", lambda: ranks.sorted_rows(raw[0], raw[1], N)  # so long a row that its keys are of 64 bits
    yield "selection", lambda: selection._magnitudes(raw[0], raw[1], np.empty(N, np.uint32))  # of small tensors alone
    rank = 16
    left, right = generator.standard_normal((rows, rank)), generator.standard_normal((rank, columns))
    yield "fold", lambda: fold.add_product(left.astype(np.float32), right.astype(np.float32), 0.5, matrix.copy())
    yield "fold", lambda: fold.accumulate(left, right, 0.5, wide.reshape(SHAPE).copy())
    yield "fold", lambda: fold.scale_rows(np.ones(rows, np.float32), 0, matrix.copy())
    yield "fold", lambda: fold.add_column_squares(matrix, np.zeros(columns))
    yield "fold", lambda: fold.scale_columns(np.ones(columns), matrix.copy())
    blocks = np.repeat(np.eye(32)[None], columns // 32, 0)
    yield "rotate", lambda: rotate.rotate(wide.reshape(SHAPE).copy(), blocks)
    yield (
        "rotate",
        lambda: rotate.reflect(wide.reshape(SHAPE).copy(), right / np.linalg.norm(right, axis=1, keepdims=True)),
    )
    keys = random.split_key(12345)
    yield "random", lambda: random.fill_normal(0, *keys, 0.02, np.empty(N, np.float32))
    yield "random", lambda: random.fill_uniform(0, *keys, 0.02, np.empty(N, np.float32))
    yield "fusion", lambda: fusion._row_divergences(_bf16(np.stack([values, values * 9.0])), N, np.empty(1))
    yield "functions", lambda: functions.exp_all(wide.copy())
    yield "functions", lambda: functions.tanh_all(wide.copy())
