"""The exact k-th magnitude: what is kept is what a stable sort keeps, whatever the distribution and the chunks."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from memory_tensor import MemoryTensor, run_fused, to_raw

from merge.engine.crew import Crew
from merge.engine.model_trim import thresholds
from merge.kernels.selection import Threshold, count_kept, largest
from merge.methods import get_method

MAGNITUDE = np.uint32(0x7FFFFFFF)


def by_sort(deltas: npt.NDArray[np.float32], keep: int) -> npt.NDArray[np.bool_]:
    """Of largest magnitude; of equal ones those of lowest index"""
    order = np.argsort(-(deltas.view(np.uint32) & MAGNITUDE).astype(np.int64), kind="stable")
    mask = np.zeros(len(deltas), bool)
    mask[order[:keep]] = True
    return mask


def by_threshold(deltas: npt.NDArray[np.float32], threshold: Threshold) -> npt.NDArray[np.bool_]:
    bits = (deltas.view(np.uint32) & MAGNITUDE).astype(np.int64)
    return (bits > threshold.bits) | ((bits == threshold.bits) & (np.arange(len(bits)) < threshold.cut))


def check(deltas: npt.NDArray[np.float32], keeps: list[int], chunk: int) -> None:
    """deltas (model, n), held against a base of zeros"""
    raw = np.concatenate([np.zeros((1, deltas.shape[1]), np.float32), deltas])
    found = largest(MemoryTensor(raw, chunk), keeps)
    for delta, keep, threshold in zip(deltas, keeps, found, strict=True):
        mask = by_threshold(delta, threshold)
        assert mask.sum() == min(keep, len(delta))
        np.testing.assert_array_equal(mask, by_sort(delta, keep))


def floats(bits: npt.ArrayLike, signs: npt.ArrayLike) -> npt.NDArray[np.float32]:
    whole = np.asarray(bits, np.uint32) | (np.asarray(signs, np.uint32) << np.uint32(31))
    return whole.view(np.float32)


@st.composite
def hard(draw: st.DrawFn) -> tuple[npt.NDArray[np.float32], list[int], int]:
    """Task vectors whose magnitudes come from a few adversarial sources, one source for each run of chunks."""
    n = draw(st.integers(1, 1500))
    chunk = draw(st.sampled_from([1, 3, 16, 50, 400, 2000]))
    random = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    sources = {
        "one value": lambda size: np.full(size, random.integers(0, 0x7F800000)),
        "two values": lambda size: random.choice(random.integers(0, 0x7F800000, 2), size),
        "two neighbours": lambda size: random.integers(0x3A000000, 0x3A000002, size),
        "any float": lambda size: random.integers(0, 0x7F800001, size),
        "denormals": lambda size: random.integers(0, 1 << 23, size),
        "few steps": lambda size: random.integers(0, 8, size) << 20,
        "normal": lambda size: (random.standard_normal(size) * 1e-3).astype(np.float32).view(np.uint32) & MAGNITUDE,
        "zeros": lambda size: np.zeros(size, np.int64),
        "top": lambda size: np.full(size, 0x7F7FFFFF),
    }
    models = []
    for _ in range(draw(st.integers(1, 3))):
        kinds = draw(st.lists(st.sampled_from(sorted(sources)), min_size=1, max_size=3))
        edges = sorted(draw(st.lists(st.integers(0, n), min_size=len(kinds) - 1, max_size=len(kinds) - 1)))
        spans = zip([0, *edges], [*edges, n], kinds, strict=True)
        bits = np.concatenate([np.asarray(sources[kind](stop - start), np.uint32) for start, stop, kind in spans])
        models.append(floats(bits, random.integers(0, 2, n)))
    keeps = [draw(st.one_of(st.integers(0, n), st.sampled_from([0, 1, n - 1, n]))) for _ in models]
    return np.stack(models), keeps, chunk


@settings(max_examples=400, deadline=None)
@given(hard())
def test_keeps_exactly_what_a_stable_sort_keeps(case: tuple[npt.NDArray[np.float32], list[int], int]) -> None:
    check(*case)


@pytest.mark.parametrize("density", [1e-5, 0.01, 0.3, 0.5, 0.99])
@pytest.mark.parametrize("sampled", ["tiny", "huge"])
def test_a_sample_that_misses_costs_passes_but_not_the_result(sampled: str, density: float) -> None:
    """Chunks 0 and 50 of 100, which are looked at first, have nothing to do with the other chunks."""
    random = np.random.default_rng(1)
    values = (random.standard_normal(100_000) * 1e-3).astype(np.float32).reshape(100, -1)
    values[[0, 33, 50, 66]] *= 1e-30 if sampled == "tiny" else 1e30
    check(values.reshape(1, -1), [count_kept(density, values.size)], 1000)


def test_bfloat16_task_vectors_with_their_many_equal_magnitudes() -> None:
    random = np.random.default_rng(2)
    base = random.standard_normal(50_000) * 0.02
    raw = to_raw([base, base + random.standard_normal(base.size) * 1e-3, base], "BF16")
    wide = (raw.astype(np.uint32) << np.uint32(16)).view(np.float32)
    deltas = wide[1:] - wide[0]
    assert len(np.unique(np.abs(deltas))) < 2000
    for keep in (1, 137, 25_000, 49_999):
        for delta, threshold in zip(deltas, largest(MemoryTensor(raw, 4096), [keep, keep]), strict=True):
            np.testing.assert_array_equal(by_threshold(delta, threshold), by_sort(delta, keep))


def test_not_a_number_counts_as_largest() -> None:
    values = np.array([[1.0, np.nan, 3.0, np.inf, 2.0]], np.float32)
    check(values, [2], 2)


@pytest.mark.parametrize(
    ("density", "size", "kept"), [(0.5, 10, 5), (0.3, 10, 3), (0.01, 10, 1), (0.0, 10, 0), (1.0, 10, 10), (0.5, 0, 0)]
)
def test_number_kept(density: float, size: int, kept: int) -> None:
    assert count_kept(density, size) == kept


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_trim_over_the_model_keeps_what_a_stable_sort_of_all_its_tensors_keeps(data: st.DataObject) -> None:
    """Two models over tensors in output order; the second lacks one of them."""
    random = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1)))
    sizes = data.draw(st.lists(st.integers(1, 300), min_size=1, max_size=6))
    few = data.draw(st.booleans())
    densities = {0: data.draw(st.sampled_from([0.0, 0.001, 0.3, 0.5, 1.0])), 1: 0.4}
    tensors, steps = {}, []
    for i, size in enumerate(sizes):
        models = (0,) if i == 1 else (0, 1)
        shape = (len(models), size)
        scale = 10.0 ** random.integers(-4, 4)
        deltas = random.integers(-2, 3, shape) if few else random.standard_normal(shape) * scale
        raw = np.concatenate([np.zeros((1, size)), deltas]).astype(np.float32)
        density = tuple(densities[model] for model in models)
        step = SimpleNamespace(size=size, models=models, parameters={"trim": "model", "density": density})
        tensors[i] = (step, raw)
        steps.append((i, step))
    places = {id(step): raw for step, raw in tensors.values()}
    notes: dict[str, Any] = {}
    context = SimpleNamespace(
        crew=Crew(2),
        out=SimpleNamespace(notes=notes, keep=notes.__setitem__),
        tensor=lambda step: MemoryTensor(places[id(step)], 64),
    )
    found = thresholds(context, steps, lambda: None)  # type: ignore[arg-type]
    ties = get_method("ties")
    assert ties is not None
    for model, density in densities.items():
        rows = [(i, step.models.index(model)) for i, step in steps if model in step.models]
        whole = np.concatenate([tensors[i][1][row + 1] for i, row in rows])
        mask = by_sort(whole, count_kept(density, len(whole)))
        kept = np.concatenate([by_threshold(tensors[i][1][row + 1], found[i]["_threshold"][row]) for i, row in rows])
        np.testing.assert_array_equal(kept, mask)
        start = 0
        for i, row in rows:
            raw = tensors[i][1][[0, row + 1]]
            limit = (found[i]["_threshold"][row],)
            got = run_fused(ties, raw, 64, weight=(1.0,), density=(density,), _threshold=limit)
            np.testing.assert_array_equal(got, np.where(mask[start : start + len(got)], raw[1], 0))
            start += len(got)
