"""Results worked out by hand, for the kernel and for the definition of every method."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from memory_tensor import run_fused, run_reference, to_raw

from merge.kernels.weights import whole
from merge.methods import get_method

T1 = [0.50, -0.10, 0.30, 0.02, -0.80, 0.00, 0.07, 0.20, -0.05, 0.60]
T2 = [-0.40, -0.20, 0.10, 0.03, 0.70, 0.01, -0.06, 0.25, 0.04, -0.60]
T3 = [0.30, 0.90, -0.35, 0.01, 0.15, -0.02, 0.05, -0.22, 0.06, 0.00]
ZERO = [0.0] * 10


@pytest.fixture(params=["kernel", "definition"])
def merged(request: pytest.FixtureRequest) -> Any:
    """Runs a method over rows (the base first where it has one), in chunks of four elements."""

    def run(name: str, rows: npt.ArrayLike, **parameters: Any) -> npt.NDArray[np.float32]:
        method = get_method(name)
        assert method is not None
        raw = to_raw(rows, "F32")
        if request.param == "kernel":
            return run_fused(method, raw, 4, **parameters)
        return run_reference(method, raw, **parameters)

    return run


def test_slerp_at_right_angles_and_lengths_one_and_two(merged: Any) -> None:
    np.testing.assert_allclose(merged("slerp", [[1, 0], [0, 2]], t=0.5), [0.70711, 1.41421], atol=1e-5)


def test_slerp_a_quarter_of_the_way_over_sixty_degrees(merged: Any) -> None:
    rows = [[1, 0], [0.5, 3**0.5 / 2]]
    got = merged("slerp", rows, t=0.25)  # the unit vector at 15 degrees
    np.testing.assert_allclose(got, [np.cos(np.pi / 12), np.sin(np.pi / 12)], atol=1e-7)


@pytest.mark.parametrize(("t", "end"), [(0.0, 0), (1.0, 1)])
def test_slerp_ends_at_its_inputs(merged: Any, t: float, end: int) -> None:
    rows = np.array([[1.0, 2.0, -0.3], [0.4, -0.5, 6.0]], np.float32)
    np.testing.assert_array_equal(merged("slerp", rows, t=t), rows[end])


@pytest.mark.parametrize("other", [[2.0, 4.0, 6.0], [-2.0, -4.0, -6.0], [0.0, 0.0, 0.0], [1.0, 2.0, 3.0001]])
def test_slerp_between_colinear_or_zero_tensors_is_linear(merged: Any, other: list[float]) -> None:
    base = np.array([1.0, 2.0, 3.0])
    wanted = 0.75 * base + 0.25 * np.array(other)
    np.testing.assert_allclose(merged("slerp", [base, other], t=0.25), wanted, rtol=1e-6)


def test_slerp_between_two_zero_tensors_is_zero(merged: Any) -> None:
    np.testing.assert_array_equal(merged("slerp", [[0, 0], [0, 0]], t=0.3), [0, 0])


def test_ties_table(merged: Any) -> None:
    """Density 0.5 keeps five of ten; 0.9 in T3 outweighs -0.2 in T2; nothing is left in four places."""
    got = merged("ties", [ZERO, T1, T2, T3], weight=(1.0, 1.0, 1.0), density=(0.5, 0.5, 0.5))
    np.testing.assert_allclose(got, [0.4, 0.9, -0.35, 0, 0.425, 0, 0, 0.225, 0, 0.6], atol=1e-7)


def test_ties_sums_without_normalize_and_scales_by_lambda(merged: Any) -> None:
    got = merged("ties", [ZERO, T1, T2, T3], weight=(1.0, 1.0, 1.0), density=(0.5,) * 3, normalize=False, lambda_=0.5)
    # .50 + .30 | .90 | -.35 | 0 | .70 + .15 | 0 | 0 | .20 + .25 | 0 | .60, halved; an even split counts as positive
    np.testing.assert_allclose(got, [0.4, 0.45, -0.175, 0, 0.425, 0, 0, 0.225, 0, 0.3], atol=1e-7)


def test_ties_weights_take_part_in_election_and_mean(merged: Any) -> None:
    rows = [[1.0, 1.0], [3.0, 2.0], [2.0, 0.0], [0.0, 4.0]]  # deltas: 2 1, 1 -1, -1 3
    got = merged("ties", rows, weight=(0.1, 0.3, 1.0), density=(1.0, 1.0, 1.0))
    # -0.5 < 0: -1 alone. 0.1 - 0.3 + 3 > 0: (0.1 * 1 + 1 * 3) / 1.1
    np.testing.assert_allclose(got, [1 - 1, 1 + 3.1 / 1.1], rtol=1e-6, atol=1e-7)


def test_ties_negative_weight_turns_the_sign_before_election(merged: Any) -> None:
    got = merged("ties", [[0.0], [2.0], [1.0]], weight=(1.0, -0.5), density=(1.0, 1.0), normalize=False)
    np.testing.assert_allclose(got, [2.0])


def test_ties_keeps_equal_magnitudes_of_lowest_index(merged: Any) -> None:
    row = [1, -1, 1, 2, 1, -1, 1, 1, 1, 1]
    got = merged("ties", [ZERO, row], weight=(1.0,), density=(0.4,))
    np.testing.assert_array_equal(got, [1, -1, 1, 2, 0, 0, 0, 0, 0, 0])


def test_ties_keeps_at_least_one_entry_but_none_at_density_zero(merged: Any) -> None:
    rows = [ZERO, T1, T2]
    got = merged("ties", rows, weight=(1.0, 1.0), density=(0.001, 0.0))
    np.testing.assert_allclose(got, [0, 0, 0, 0, -0.8, 0, 0, 0, 0, 0], rtol=1e-6)


@pytest.mark.parametrize("weight", [(0.3, 0.3, 0.6), (0.1, 0.2, 0.3), (0.7, 0.1, 0.8), (1.1, 2.2, 3.3)])
@pytest.mark.parametrize("method", ["ties", "dare_ties"])
def test_a_sum_that_is_zero_in_decimals_is_positive(merged: Any, method: str, weight: tuple[float, ...]) -> None:
    """0.3 + 0.3 - 0.6 is zero, and zero counts as +; in binary these weights leave a rest of either sign."""
    rows = [[0.0] * 4, [1, 3, 5, 7], [1, 3, 5, 7], [-1, -3, -5, -7]]
    keys = {"_keys": (1, 2, 3)} if method == "dare_ties" else {}
    got = merged(method, rows, weight=weight, density=(1.0, 1.0, 1.0), normalize=False, **keys)
    np.testing.assert_allclose(got, (weight[0] + weight[1]) * np.array([1, 3, 5, 7]), rtol=1e-6)


def test_weights_become_whole_numbers_only_where_they_are_short_fractions() -> None:
    assert whole((0.3, 0.3, -0.6)) == ((3.0, 3.0, -6.0), 10.0)
    assert whole((1.0, 0.5)) == ((2.0, 1.0), 2.0)
    assert whole((0.0, 7.0)) == ((0.0, 7.0), 1.0)
    assert whole((0.5 / 0.3, 0.1)) == ((50.0, 3.0), 30.0)
    odd = (0.12345678901234, 0.5)
    assert whole(odd) == (odd, 1.0)
    tiny = (1e-12, 0.5)
    assert whole(tiny) == (tiny, 1.0)


def test_linear_divides_by_the_sum_of_weights(merged: Any) -> None:
    rows = [[1, 2, 3, 4, 5], [10, 20, 30, 40, 50], [0, 0, 0, 0, 1]]
    got = merged("linear", rows, weight=(1.0, 0.3, 0.7))
    np.testing.assert_allclose(got, [2, 4, 6, 8, (5 + 15 + 0.7) / 2], rtol=1e-6)


def test_linear_without_normalize_is_the_weighted_sum(merged: Any) -> None:
    got = merged("linear", [[1, 2], [10, -20]], weight=(1.0, -0.3), normalize=False)
    np.testing.assert_allclose(got, [-2, 8], rtol=1e-6)


def test_linear_of_equal_models_is_that_model(merged: Any) -> None:
    row = np.random.default_rng(0).standard_normal(1000).astype(np.float32)
    np.testing.assert_array_equal(merged("linear", [row, row, row], weight=(0.3, 0.3, 0.1)), row)


def test_task_arithmetic_adds_and_subtracts(merged: Any) -> None:
    rows = [[1.0, 1.0, 1.0], [2.0, 0.0, 1.0], [1.5, 3.0, 1.0]]  # deltas: 1 -1 0, .5 2 0
    got = merged("task_arithmetic", rows, weight=(0.5, -1.0))
    np.testing.assert_allclose(got, [1.0, -1.5, 1.0], atol=1e-7)


def test_task_arithmetic_with_lambda_and_normalize(merged: Any) -> None:
    rows = [[1.0, 1.0], [2.0, 0.0], [1.5, 3.0]]
    got = merged("task_arithmetic", rows, weight=(3.0, 1.0), normalize=True, lambda_=2.0)
    np.testing.assert_allclose(got, [1 + 2 * 3.5 / 4, 1 - 2 * 1 / 4], rtol=1e-6)


def test_task_arithmetic_normalize_of_weights_that_cancel_divides_by_one(merged: Any) -> None:
    got = merged("task_arithmetic", [[0.0], [3.0], [1.0]], weight=(0.5, -0.5), normalize=True)
    np.testing.assert_allclose(got, [1.0])


@pytest.mark.parametrize("method", ["dare_linear", "dare_ties"])
def test_dare_with_density_one_drops_nothing(merged: Any, method: str) -> None:
    got = merged(method, [[1.0, 1.0], [2.0, 0.0], [1.5, 0.0]], weight=(0.5, 1.0), density=(1.0, 1.0), _keys=(5, 6))
    np.testing.assert_allclose(got, [2.0, -0.5], rtol=1e-6)


@pytest.mark.parametrize("method", ["dare_linear", "dare_ties"])
def test_dare_rescales_survivors_by_the_density_or_by_the_norm_lost(merged: Any, method: str) -> None:
    row = np.arange(1.0, 201.0)
    rows = [np.zeros(200), row]
    kept = merged(method, rows, weight=(2.0,), density=(0.25,), rescale=False, _keys=(77,)) != 0
    assert 20 < kept.sum() < 80
    unbiased = merged(method, rows, weight=(2.0,), density=(0.25,), rescale=True, _keys=(77,))
    np.testing.assert_allclose(unbiased, np.where(kept, 8 * row, 0), rtol=1e-6)
    same_norm = merged(method, rows, weight=(2.0,), density=(0.25,), rescale="l1", _keys=(77,))
    np.testing.assert_allclose(same_norm, np.where(kept, 2 * row * row.sum() / row[kept].sum(), 0), rtol=1e-6)


def test_passthrough_scales(merged: Any) -> None:
    np.testing.assert_array_equal(merged("passthrough", [[1.0, -2.0]]), [1.0, -2.0])
    np.testing.assert_array_equal(merged("passthrough", [[1.0, -2.0]], scale=(0.5,)), [0.5, -1.0])
    np.testing.assert_array_equal(merged("passthrough", [[1.0, -2.0]], scale=(None,)), [1.0, -2.0])
