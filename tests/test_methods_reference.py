"""Kernel = definition, for every method that has a kernel; and what random masks promise."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from memory_tensor import MemoryTensor, run_fused, run_reference, to_raw, widened

from merge.kernels.protocol import Block
from merge.kernels.reference import random_mask
from merge.methods import Method, Parameter, all_methods
from merge.random_keys import random_key

FUSED = {name: method for name, method in all_methods().items() if method.fused}
SMALL_CHUNK, CHUNK = 1 << 12, 1 << 17
SHAPES = [(), (1,), (7,), (5, 3), (4095,), (4096,), (4097,), (3, 3000), (2, 0)]
BORDER = [(131071,), (131072,), (131073,)]
DATA = ("normal", "integers", "zero deltas", "sparse", "huge range", "denormals")
VALUES: dict[str, tuple[Any, ...]] = {
    "weight": (0.3, 1.0, -0.5, 0.0, 0.123456789, 2.0),
    "density": (0.0, 1e-6, 0.3, 0.5, 1.0),
    "lambda": (1.0, 0.7, -1.0),
    "t": (0.0, 0.35, 0.5, 1.0),
    "scale": (None, 0.5, -2.0),
    "select_topk": (0.0, 0.1, 0.5, 0.999, 1.0),
    "gamma": (0.0, 0.01, 0.3, 1.0),
    "mask_lambda": (0.0, 0.3, 0.5, 2.0),
}


def make(kind: str, n_sources: int, size: int, dtype: str, random: np.random.Generator) -> npt.NDArray[Any]:
    """(source, n) raw values; row 0 may be a base"""
    base = random.standard_normal(size) * 0.02
    deltas = random.standard_normal((n_sources, size)) * 1e-3
    if kind == "integers":
        base, deltas = random.integers(-8, 9, size), random.integers(-3, 4, (n_sources, size))
    elif kind == "zero deltas":
        deltas[random.integers(n_sources)] = 0
    elif kind == "sparse":
        deltas *= random.random((n_sources, size)) < 0.01
    elif kind == "huge range":
        base, deltas = base * 0, deltas * 10.0 ** random.integers(-20, 20, (n_sources, size))
    elif kind == "denormals":
        base, deltas = base * 1e-38, deltas * 1e-36
    deltas[0] = 0
    return to_raw(base + deltas, dtype)


def draw(method: Method, n_models: int, random: np.random.Generator) -> dict[str, Any]:
    """One value for each parameter that a recipe may write."""

    def one(parameter: Parameter) -> Any:
        if parameter.choices:
            return parameter.choices[random.integers(len(parameter.choices))]
        if parameter.kind is bool:
            return bool(random.integers(2))
        known = VALUES.get(parameter.name, (parameter.default,))
        return known[random.integers(len(known))]

    drawn: dict[str, Any] = {}
    for parameter in method.parameters:
        name = "lambda_" if parameter.name == "lambda" else parameter.name
        drawn[name] = tuple(one(parameter) for _ in range(n_models)) if parameter.per_model else one(parameter)
    drawn |= {"trim": "tensor"} if "trim" in drawn else {}  # over the model: see test_selection.py
    drawn |= {"_keys": tuple(int(key) for key in random.integers(0, 2**63, n_models))} if method.random else {}
    if "epsilon" in drawn and "density" in drawn:  # probabilities within 0 and 1
        drawn["epsilon"] = tuple(share * min(share, 1 - share) for share in drawn["density"])
    if method.check and method.check(drawn):
        drawn["weight"] = tuple(abs(weight) + 0.1 for weight in drawn["weight"])
    return drawn


def agree(raw: npt.NDArray[Any], got: npt.NDArray[Any], wanted: npt.NDArray[Any]) -> None:
    """Equal, but for the last bit where float64 sums were rounded in another order."""
    assert np.array_equal(np.isfinite(got), np.isfinite(wanted))
    scale = np.abs(widened(raw).astype(np.float64)).max(axis=0, initial=0.0) * 8
    scale = np.maximum(scale, np.abs(wanted.astype(np.float64)))
    assert (np.abs(got.astype(np.float64) - wanted) <= 2.0**-22 * scale + 1e-44).all()
    if raw.dtype == np.uint16:  # then task vectors are exact in both
        assert len(np.unique(wanted[got != wanted])) <= 2 + 1e-3 * got.size  # few integers recur many times


@pytest.mark.parametrize("dtype", ["BF16", "F32"])
@pytest.mark.parametrize("name", FUSED)
def test_kernel_gives_what_the_definition_gives(name: str, dtype: str) -> None:
    method = FUSED[name]
    random = np.random.default_rng(list(name.encode()))
    fewest, most = method.n_models
    counts = [n for n in (1, 2, 3, 5) if fewest <= n <= (most or 5)]
    cases = [(shape, kind, SMALL_CHUNK) for kind in DATA for shape in SHAPES * 2] + [
        (shape, kind, CHUNK) for shape, kind in zip(BORDER, DATA, strict=False)
    ]
    for case, (shape, kind, chunk) in enumerate(cases):
        n_models = counts[case % len(counts)]
        with_base = method.inputs == "deltas" or (method.inputs == "either" and case // len(counts) % 2 == 0)
        raw = make(kind, n_models + with_base, math.prod(shape), dtype, random)
        parameters = draw(method, n_models, random)
        got = run_fused(method, raw, chunk, shape=shape, **parameters)
        wanted = run_reference(method, raw, shape, **parameters)
        agree(raw, got, wanted)


@pytest.mark.parametrize("name", FUSED)
def test_blocks_do_not_change_a_bit(name: str) -> None:
    method = FUSED[name]
    random = np.random.default_rng(3)
    n_models = max(2, method.n_models[0]) if method.n_models[1] != 1 else 1
    for kind in DATA[:3]:
        raw = make(kind, n_models + (method.inputs == "deltas"), 1000, "BF16", random)
        parameters = draw(method, n_models, random)
        whole = run_fused(method, raw, 64, per_block=16, **parameters)
        np.testing.assert_array_equal(run_fused(method, raw, 64, per_block=1, **parameters), whole)
        np.testing.assert_array_equal(run_fused(method, raw, 64, per_block=5, **parameters), whole)


def kept(name: str, density: float, key: int, n: int) -> npt.NDArray[np.bool_]:
    """The mask of a DARE kernel: what is left of ones."""
    rows = np.zeros((2, n), np.float32)
    rows[1] = 1
    got = run_fused(FUSED[name], rows, CHUNK, weight=(1.0,), density=(density,), rescale=False, _keys=(key,))
    return got != 0


@pytest.mark.parametrize("density", [0.0, 2.0**-32, 1e-4, 0.3, 0.5, 0.999, 1.0])
@pytest.mark.parametrize("name", ["dare_linear", "dare_ties"])
def test_kernel_and_definition_drop_the_same_entries(name: str, density: float) -> None:
    n = CHUNK + 77
    for key in (0, 1, 2**64 - 1, random_key(7, "model.norm.weight", 2)):
        mask = random_mask(torch.empty(n), density, key).numpy()
        np.testing.assert_array_equal(kept(name, density, key, n), mask)
    assert mask.all() if density == 1 else not mask.all()


def test_masks_of_entries_past_2_to_the_32_do_not_depend_on_blocks_and_do_not_repeat() -> None:
    combine = FUSED["dare_linear"].load_fused()(  # type: ignore[misc]
        MemoryTensor(np.zeros((2, 1), np.float32), 1), weight=(1.0,), density=(0.5,), rescale=False, _keys=(9,)
    )

    def mask(start: int, n: int) -> npt.NDArray[np.float32]:
        out = np.empty(n, np.float32)
        combine(Block(start, np.stack([np.zeros(n, np.float32), np.ones(n, np.float32)])), out)
        return out

    edge = 1 << 32
    across = mask(edge - 300, 1000)
    np.testing.assert_array_equal(across, np.concatenate([mask(edge - 300, 300), mask(edge, 700)]))
    low, high = mask(0, 4096), mask(edge, 4096)
    assert abs(np.corrcoef(low, high)[0, 1]) < 5 / math.sqrt(4096)


@pytest.mark.parametrize("density", [0.05, 0.3, 0.5, 0.9])
def test_masks_keep_their_share_with_the_spread_of_independent_draws(density: float) -> None:
    n, parts = 1 << 20, 1024
    mask = random_mask(torch.empty(n), density, random_key(0, "model.layers.0.mlp.up_proj.weight", 0)).numpy()
    spread = math.sqrt(density * (1 - density) / n)
    assert abs(mask.mean() - density) < 4 * spread
    shares = mask.reshape(parts, -1).mean(axis=1)
    expected = density * (1 - density) / (n / parts)
    assert abs(shares.var() / expected - 1) < 5 * math.sqrt(2 / parts)


def correlation(a: npt.NDArray[np.bool_], b: npt.NDArray[np.bool_]) -> float:
    """In standard deviations of what independent masks would show."""
    return float(np.corrcoef(a, b)[0, 1]) * math.sqrt(len(a))


def test_masks_of_models_tensors_and_seeds_are_independent() -> None:
    n = 1 << 16
    keys = [random_key(seed, name, model) for seed in (0, 1) for name in ("a.weight", "b.weight") for model in range(4)]
    masks = [random_mask(torch.empty(n), 0.4, key).numpy() for key in keys]
    found = [correlation(masks[i], masks[j]) for i in range(len(masks)) for j in range(i)]
    assert max(map(abs, found)) < 4.5
    assert 0.6 < np.std(found) < 1.4


@pytest.mark.parametrize("key", [0, random_key(0, "a.weight", 0), random_key(0, "a.weight", 1)])
def test_neighbours_and_rows_of_a_mask_are_independent(key: int) -> None:
    mask = random_mask(torch.empty(1 << 18), 0.5, key).numpy()
    for lag in (1, 2, 3, 16, 64, 1024, 4096, 14336):
        assert abs(correlation(mask[lag:], mask[:-lag])) < 4.5
