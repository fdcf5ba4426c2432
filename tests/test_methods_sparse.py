"""Breadcrumbs, DELLA, consensus and PCB: what they keep, counted and measured, and the variants of election."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from memory_tensor import Floats, MemoryTensor, run_fused, run_reference, to_raw, widened

from merge.kernels.protocol import Block
from merge.kernels.ranks import sorted_rows
from merge.kernels.reference import rank_probabilities
from merge.kernels.sparsify import dropped, dropped_by_rank, random_masks
from merge.methods import Method, get_method
from merge.random_keys import random_key

T1 = [0.50, -0.10, 0.30, 0.02, -0.80, 0.00, 0.07, 0.20, -0.05, 0.60]
T2 = [-0.40, -0.20, 0.10, 0.03, 0.70, 0.01, -0.06, 0.25, 0.04, -0.60]
T3 = [0.30, 0.90, -0.35, 0.01, 0.15, -0.02, 0.05, -0.22, 0.06, 0.00]
ROWS = [[0.0] * 10, T1, T2, T3]
EQUAL = {"weight": (1.0, 1.0, 1.0), "density": (0.5, 0.5, 0.5)}


def named(name: str) -> Method:
    method = get_method(name)
    assert method is not None
    return method


@pytest.fixture(params=["kernel", "definition"])
def merged(request: pytest.FixtureRequest) -> Any:
    """Runs a method over rows, the base first, in chunks of four elements."""

    def run(name: str, rows: npt.ArrayLike, **parameters: Any) -> Floats:
        run = run_reference if request.param == "definition" else lambda *a, **b: run_fused(*a, 4, **b)
        return run(named(name), to_raw(rows, "F32"), **parameters)

    return run


def test_breadcrumbs_table(merged: Any) -> None:
    """Without the largest of each row (-.8, .7, .9) the next four: .6 .5 .3 .2 | -.6 -.4 .25 -.2 | -.35 .3 -.22 .15"""
    parameters = {"weight": (1.0,) * 3, "density": (0.4,) * 3, "gamma": (0.1,) * 3}
    got = merged("breadcrumbs", ROWS, **parameters)
    np.testing.assert_allclose(got, [0.4, -0.2, -0.05, 0, 0.15, 0, 0, 0.23, 0, 0], atol=1e-7)
    got = merged("breadcrumbs_ties", ROWS, **parameters)  # an even split counts as positive
    np.testing.assert_allclose(got, [0.8, -0.2, -0.35, 0, 0.15, 0, 0, 0.45, 0, 0.6], atol=1e-7)
    got = merged("breadcrumbs_ties", ROWS, **parameters, normalize=True, lambda_=2.0)
    np.testing.assert_allclose(got, [0.8, -0.4, -0.7, 0, 0.3, 0, 0, 0.45, 0, 1.2], atol=1e-7)


def test_gamma_shrinks_until_density_fits(merged: Any) -> None:
    row = np.arange(1.0, 11.0)
    got = merged("breadcrumbs", [row * 0, row], weight=(1.0,), density=(0.8,), gamma=(0.5,))
    np.testing.assert_array_equal(got, np.where(row <= 8, row, 0))
    got = merged("breadcrumbs", [row * 0, row], weight=(1.0,), density=(1.0,), gamma=(0.5,))
    np.testing.assert_array_equal(got, row)
    got = merged("breadcrumbs", [row * 0, row], weight=(1.0,), density=(0.0,), gamma=(0.5,))
    np.testing.assert_array_equal(got, row * 0)


def test_breadcrumbs_to_the_old_norm(merged: Any) -> None:
    got = merged("breadcrumbs", [[0.0] * 4, [8, -4, 2, 1]], weight=(1.0,), density=(0.5,), gamma=(0.25,), rescale="l1")
    np.testing.assert_allclose(got, [0, -10, 5, 0])


@pytest.mark.parametrize("distinct", [1, 2, 7, 100])
@pytest.mark.parametrize("name", ["breadcrumbs", "breadcrumbs_ties"])
def test_breadcrumbs_keeps_what_a_stable_sort_keeps(name: str, distinct: int) -> None:
    """Exact counts, and of equal magnitudes the lowest index counts as larger."""
    random = np.random.default_rng(distinct)
    for n, chunk in [(1, 1), (10, 3), (1000, 64), (1000, 1000), (5000, 4096)]:
        delta = random.integers(1, distinct + 1, n) * random.choice([-1.0, 1.0], n)
        for density, gamma in [(0.5, 0.01), (0.3, 0.25), (0.001, 0.999), (0.9, 0.5), (0.25, 0.0)]:
            k = max(1, int(density * n))
            top = min(int(gamma * n), n - k)
            order = np.argsort(-np.abs(delta), kind="stable")[top : top + k]
            wanted = np.zeros(n)
            wanted[order] = delta[order]
            raw = np.stack([delta * 0, delta]).astype(np.float32)
            got = run_fused(named(name), raw, chunk, weight=(1.0,), density=(density,), gamma=(gamma,))
            np.testing.assert_array_equal(got, wanted)


@pytest.mark.parametrize(
    ("variant", "wanted"),
    [
        ({}, [0.4, 0.9, -0.35, 0, 0.425, 0, 0, 0.225, 0, 0.6]),
        ({"merge_func": "sum"}, [0.8, 0.9, -0.35, 0, 0.85, 0, 0, 0.45, 0, 0.6]),
        ({"normalize": False, "merge_func": "mean"}, [0.4, 0.9, -0.35, 0, 0.425, 0, 0, 0.225, 0, 0.6]),
        # .30 against -.35: a draw, so +; -.2 against .9: a draw; .6 against -.6 too
        ({"consensus": "count"}, [0.4, 0.9, 0.3, 0, 0.425, 0, 0, 0.225, 0, 0.6]),
        ({"weight": (2.0, 2.0, 2.0), "divide_by": "count"}, [0.8, 1.8, -0.7, 0, 0.85, 0, 0, 0.45, 0, 1.2]),
        ({"weight": (3.0, 1.0, 1.0), "divide_by": "count"}, [0.9, 0.9, 0.9, 0, -2.4, 0, 0, 0.425, 0, 1.8]),
    ],
)
def test_variants_of_ties(merged: Any, variant: dict[str, Any], wanted: list[float]) -> None:
    np.testing.assert_allclose(merged("ties", ROWS, **(EQUAL | variant)), wanted, atol=1e-6)


@pytest.mark.parametrize("name", ["dare_ties", "breadcrumbs_ties", "della"])
def test_variants_are_the_same_for_all_methods_that_elect(merged: Any, name: str) -> None:
    """With density 1 nothing is dropped, and all of them are ties."""
    random = np.random.default_rng(0)
    rows = random.integers(-3, 4, (6, 40)).astype(np.float32)
    extra = {"breadcrumbs_ties": {"gamma": (0.01,) * 5}}.get(name, {"_keys": (1, 2, 3, 4, 5)})
    extra |= {"epsilon": (0.15,) * 5} if name == "della" else {}
    for consensus in ("sum", "count"):
        for divide_by in ("weights", "count"):
            for merge_func in ("normalize", "mean", "sum"):
                how = {"consensus": consensus, "divide_by": divide_by, "merge_func": merge_func, "normalize": True}
                how |= {"weight": (0.3, 0.3, 0.6, -0.2, 1.0), "density": (1.0,) * 5, "lambda_": 0.7}
                np.testing.assert_array_equal(merged(name, rows, **how, **extra), merged("ties", rows, **how))


@pytest.mark.parametrize("length", [1, 2, 3, 31, 32, 33, 500, 1023, 1024, 3000, 65536, 65537])
def test_the_order_of_a_row_is_that_of_a_stable_sort(length: int) -> None:
    """Whether 32 bits hold the magnitudes with their places (rows 0 to 2 of bfloat16), nearly so, or not at all."""
    random = np.random.default_rng(length)
    rows = 7
    base = random.standard_normal((rows, length)).astype(np.float32)
    tuned = base + random.standard_normal((rows, length)).astype(np.float32) * np.float32(1e-3)
    tuned[1] = base[1]
    tuned[2] = base[2] + random.integers(-2, 3, length).astype(np.float32)
    base[3:], tuned[3] = 0, random.integers(0, 0x7F800000, length).astype(np.uint32).view(np.float32)
    tuned[4] = random.integers(0, 300, length).astype(np.uint32).view(np.float32)  # denormal
    tuned[5] = random.choice(np.array([1.0, np.inf, np.nan, 2.0, -np.inf], np.float32), length)
    tuned[6] = random.integers(0, 1 << 24, length)  # one more bit than there is room for from the second place on
    for chosen in (slice(None), slice(0, 3), slice(2, 7)):  # rows with 64 bits are few, none and most
        for dtype in ("F32", "BF16"):
            raw = to_raw([base[chosen].reshape(-1), tuned[chosen].reshape(-1)], dtype)
            keys, place = sorted_rows(raw[0], raw[1], length)
            size = np.abs(widened(raw)[1] - widened(raw)[0]).reshape(-1, length)
            np.testing.assert_array_equal(keys & place, np.argsort(size, axis=1, kind="stable"))


def test_random_numbers_go_on_where_the_counter_begins_again_within_a_row() -> None:
    """Flat indices past 2^32: the same entries stay as under the mask that DARE would use there."""
    length, start, key = 1000, (1 << 32) - 2600, (7 << 32) | 5
    raw = np.stack([np.zeros(5 * length), np.random.default_rng(0).standard_normal(5 * length)]).astype(np.float32)
    block = Block(start, raw)
    got = dropped_by_rank(MemoryTensor(raw, 1 << 20, (5, length)), [key], [0.4], [0.0], unbiased=False)(block).copy()
    np.testing.assert_array_equal(got, dropped(random_masks([key], [0.4]))(block))


def test_probabilities_rise_with_the_rank_in_equal_steps() -> None:
    p = rank_probabilities(torch.tensor([[0.1, -3.0, 0.0, 2.0, 0.5], [1.0, 1.0, -1.0, 0.0, 1.0]]), 0.5, 0.2)
    np.testing.assert_allclose(p[0], [0.4, 0.7, 0.3, 0.6, 0.5])
    np.testing.assert_allclose(p[1], [0.4, 0.5, 0.6, 0.3, 0.7])  # of equal ones the first is smaller
    assert rank_probabilities(torch.tensor(4.0), 0.3, 0.2).item() == 0.3


@pytest.mark.parametrize("name", ["della", "della_linear"])
def test_della_keeps_by_decile_what_its_probabilities_say_and_is_unbiased(name: str) -> None:
    random = np.random.default_rng(5)
    shape, density, epsilon = (512, 2000), 0.4, 0.3
    delta = random.standard_normal(shape).astype(np.float32)
    raw = np.stack([delta.reshape(-1) * 0, delta.reshape(-1)])
    ranks = np.argsort(np.argsort(np.abs(delta), axis=1), axis=1)
    decile = (ranks * 10 // shape[1]).reshape(-1)
    parameters = {"weight": (1.0,), "density": (density,), "epsilon": (epsilon,)}
    parameters |= {"_keys": (random_key(0, "model.layers.0.mlp.up_proj.weight", 0),)}
    plain = run_fused(named(name), raw, 1 << 17, shape=shape, **parameters, rescale=False)
    scaled = run_fused(named(name), raw, 1 << 17, shape=shape, **parameters, rescale=True)
    assert set(np.unique(plain[plain != 0] / delta.reshape(-1)[plain != 0])) == {1.0}
    for tenth in range(10):
        here = decile == tenth
        p = (density - epsilon) + ranks.reshape(-1)[here] * (2 * epsilon / (shape[1] - 1))
        spread = math.sqrt((p * (1 - p)).sum()) / here.sum()
        assert abs((plain[here] != 0).mean() - p.mean()) < 4 * spread
        size = np.abs(delta.reshape(-1)[here].astype(np.float64))
        spread = math.sqrt((size**2 * (1 / p - 1)).sum())
        assert abs(np.abs(scaled[here].astype(np.float64)).sum() - size.sum()) < 4 * spread
    assert abs((plain != 0).mean() - density) < 4 * math.sqrt(density / plain.size)


@pytest.mark.parametrize("name", ["della", "della_linear"])
@pytest.mark.parametrize("shape", [(9000,), (90, 100), (3, 3000), (4500, 2), (30, 3, 100), (9000, 1)])
def test_della_drops_the_same_entries_as_its_definition(name: str, shape: tuple[int, ...]) -> None:
    """Whatever the blocks; a vector that is cut into chunks is still one row."""
    random = np.random.default_rng(1)
    raw = to_raw(np.concatenate([np.zeros((1, 9000)), random.integers(-40, 41, (3, 9000))]), "BF16")
    parameters = {"weight": (0.5, 1.0, -0.3), "density": (0.5, 1.0, 0.2), "epsilon": (0.3, 0.9, 0.1)}
    parameters |= {"_keys": (11, 2**64 - 1, 7)}
    for rescale in (True, False):
        wanted = run_reference(named(name), raw, shape, **parameters, rescale=rescale)
        for chunk, per_block in [(1024, 1), (1024, 3), (1 << 17, 1)]:
            got = run_fused(named(name), raw, chunk, per_block, shape, **parameters, rescale=rescale)
            np.testing.assert_array_equal(got, wanted)


@pytest.mark.parametrize(
    ("density", "epsilon", "good"),
    [
        (0.5, 0.15, True),
        (0.1, 0.15, False),
        (0.9, 0.1, False),
        (1.0, 0.15, True),
        (0.0, 0.15, True),
        (0.15, 0.15, False),
    ],
)
def test_probabilities_outside_0_and_1_are_a_problem_of_the_plan(density: float, epsilon: float, good: bool) -> None:
    for name in ("della", "della_linear"):
        check = named(name).check
        assert check is not None
        message = check({"density": (0.5, density), "epsilon": (0.15, epsilon)})
        assert message is None if good else f"density {density:g} with epsilon {epsilon:g}" in str(message)


def test_consensus_keeps_what_k_models_find_in_the_sum(merged: Any) -> None:
    """Sums 3 2 -1 0.5; at lambda 1 both, one, one and both magnitudes reach their distance from it."""
    rows = [[0.0] * 4, [1.5, 2.0, 1.0, 0.25], [1.5, 0.0, -2.0, 0.25]]
    how = {"weight": (1.0, 1.0), "mask_lambda": (1.0, 1.0)}
    np.testing.assert_allclose(merged("consensus_ta", rows, **how), [3, 0, 0, 0.5])
    np.testing.assert_allclose(merged("consensus_ta", rows, **how, k=1, lambda_=0.5), [1.5, 1, -0.5, 0.25])
    np.testing.assert_allclose(merged("consensus_ta", rows, **how, k=0), [3, 2, -1, 0.5])
    np.testing.assert_allclose(merged("consensus_ta", rows, **how, k=3), [0, 0, 0, 0])


def test_pcb_averages_the_strongest_by_their_strength() -> None:
    """Written out for two models of four entries, the outlier limits doing nothing but cut the largest."""
    rows = np.array([[4.0, 1.0, 2.0, 0.5], [3.0, -1.0, 0.25, 1.0]])
    strength, size = [], []
    for row in rows:
        a = np.minimum(np.abs(row), np.sort(np.abs(row))[2])  # floor(4 * 0.9999) - 1 is the third
        unit = (a - a.min()) / (a.max() - a.min())
        strength.append(np.exp(2 * unit**2) * np.tanh(row * rows.sum(0)))
        size.append(a)
    beta = []
    for row in strength:
        limited = np.maximum(row, np.sort(row)[2])  # density 0.5
        beta.append((limited - limited.min()) / (limited.max() - limited.min()))
    total = sum(b * np.sign(row) * a for b, row, a in zip(beta, rows, size, strict=True))
    wanted = 1 + 0.5 * total / np.maximum(sum(beta), 1e-12)
    raw = np.concatenate([np.ones((1, 4)), 1 + rows]).astype(np.float32)
    got = run_reference(named("pcb"), raw, weight=(1.0, 1.0), density=0.5, lambda_=0.5)
    np.testing.assert_allclose(got, wanted, rtol=1e-6)


@pytest.mark.parametrize("shape", [(), (1,), (0,), (2, 0), (3, 5)])
def test_pcb_of_one_model_and_of_nothing(shape: tuple[int, ...]) -> None:
    n = math.prod(shape)
    delta = np.linspace(1, 2, n).astype(np.float32)
    raw = np.stack([np.ones(n, np.float32), 1 + delta])
    got = run_reference(named("pcb"), raw, shape, weight=(1.0,), density=1.0)
    assert np.isfinite(got).all()
    np.testing.assert_array_equal(run_reference(named("pcb"), raw[[0, 0]], shape, weight=(1.0,)), raw[0])
    if n == 1:
        np.testing.assert_array_equal(got, raw[1])
