"""Results worked out by hand, for the kernel and for the definition of every method."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from memory_tensor import run_fused, run_reference, to_raw

from merge.errors import NumbersError
from merge.kernels.weights import whole
from merge.methods import get_method
from merge.methods.arcee_fusion import divergence

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
        return run_reference(method, raw, parameters.pop("shape", None), **parameters)

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


def test_nuslerp_and_karcher_at_right_angles_and_lengths_one_and_two(merged: Any) -> None:
    rows = [[1, 0], [0, 2]]
    np.testing.assert_allclose(merged("nuslerp", rows, weight=(1.0, 1.0)), [0.70711, 1.41421], atol=1e-5)
    np.testing.assert_allclose(merged("karcher", rows, weight=(1.0, 1.0)), [1.06066, 1.06066], atol=1e-5)
    np.testing.assert_allclose(merged("multislerp", rows, weight=(1.0, 1.0)), [1.06066, 1.06066], atol=1e-5)


def test_nuslerp_weighs_and_leaves_from_the_base(merged: Any) -> None:
    sixty = [[1, 0], [0.5, 3**0.5 / 2]]
    wanted = np.array([np.cos(np.pi / 12), np.sin(np.pi / 12)])  # a quarter of the way
    np.testing.assert_allclose(merged("nuslerp", sixty, weight=(3.0, 1.0)), wanted, atol=1e-7)
    base = np.array([2.0, -1.0])
    got = merged("nuslerp", [base, *(base + sixty)], weight=(0.3, 0.1))
    np.testing.assert_allclose(got, base + wanted, atol=1e-6)


@pytest.mark.parametrize("with_base", [False, True])
def test_nuslerp_by_rows_and_columns(merged: Any, with_base: bool) -> None:
    first = np.array([[1.0, 0.0], [0.0, 0.0], [0.0, 3.0]])
    second = np.array([[0.0, 2.0], [1.0, 1.0], [0.0, 5.0]])
    rows = [[0.70711, 1.41421], [0.5, 0.5], [0, 4]]  # a right angle; no length: linear; one direction: linear
    columns = np.empty((3, 2))
    for i in range(2):
        columns[:, i] = merged("nuslerp", [first[:, i], second[:, i]], weight=(1.0, 1.0))
    base = np.full((3, 2), 0.25) * with_base
    inputs = [base + first, base + second]
    flat = [value.reshape(-1) for value in ([base] if with_base else []) + inputs]
    for row_wise, wanted in ((False, rows), (True, columns)):
        got = merged("nuslerp", flat, shape=(3, 2), weight=(1.0, 1.0), nuslerp_flatten=False, nuslerp_row_wise=row_wise)
        np.testing.assert_allclose(got.reshape(3, 2), base + wanted, atol=2e-5)


def test_nuslerp_of_opposites_and_of_weights_that_cancel_is_halfway(merged: Any) -> None:
    np.testing.assert_allclose(merged("nuslerp", [[1.0, 1.0], [-3.0, -3.0]], weight=(1.0, 1.0)), [-1, -1], rtol=1e-6)
    got = merged("nuslerp", [[1, 0], [0, 2]], weight=(0.5, -0.5))
    np.testing.assert_allclose(got, [0.70711, 1.41421], atol=1e-5)


def test_multislerp_has_the_mean_length_and_the_direction_of_the_sum(merged: Any) -> None:
    got = merged("multislerp", [[1, 0], [0, 2], [0, 3]], weight=(2.0, 1.0, 1.0))
    np.testing.assert_allclose(got, np.array([1, 1]) / 2**0.5 * (0.5 + 0.5 + 0.75), rtol=1e-6)
    whole = merged("multislerp", [[1, 0], [0, 2], [0, 3]], weight=(2.0, 1.0, 1.0), normalize_weights=False)
    np.testing.assert_allclose(whole, 4 * got, rtol=1e-6)
    np.testing.assert_allclose(merged("multislerp", [[5, 5], [6, 5], [5, 7]], weight=(1.0, 1.0)), [6.06066, 6.06066])


def test_multislerp_of_opposites_is_the_weighted_sum_of_two_and_an_error_for_more(merged: Any) -> None:
    np.testing.assert_allclose(merged("multislerp", [[1.0, 2.0], [-3.0, -6.0]], weight=(1.0, 1.0)), [-1, -2], rtol=1e-6)
    with pytest.raises(NumbersError, match="cancel"):
        merged("multislerp", [[1.0, 2.0], [-3.0, -6.0], [0.0, 0.0]], weight=(1.0, 1.0, 1.0))
    np.testing.assert_array_equal(merged("multislerp", [[1.0, 2.0]], weight=(0.3,)), [1, 2])


def test_karcher_is_halfway_between_three_on_an_arc_and_leaves_out_zero(merged: Any) -> None:
    angles = np.radians([0, 30, 90])
    rows = [[np.cos(a), np.sin(a)] for a in angles]
    wanted = [np.cos(np.radians(40)), np.sin(np.radians(40))]
    np.testing.assert_allclose(merged("karcher", rows, weight=(1.0,) * 3, tol=1e-9), wanted, atol=1e-6)
    np.testing.assert_allclose(merged("karcher", [*rows, [0, 0]], weight=(1.0,) * 4, tol=1e-9), wanted, atol=1e-6)
    weighed = merged("karcher", [rows[0], rows[2]], weight=(1.0, 2.0))
    np.testing.assert_allclose(weighed, [np.cos(np.pi / 3), np.sin(np.pi / 3)], atol=1e-5)


def test_nearswap_moves_no_entry_by_more_than_t(merged: Any) -> None:
    got = merged("nearswap", [[1.0, 1.0, 1.0], [1.05, 3.0, 0.0]], t=0.1)
    np.testing.assert_allclose(got, [1.05, 1.1, 0.9], rtol=1e-6)


def test_model_stock_ratio(merged: Any) -> None:
    rows = [[1.0, 1.0], [2.0, 1.0], [1.5, 1 + 3**0.5 / 2]]  # two unit task vectors at 60 degrees: t = 2/3
    np.testing.assert_allclose(merged("model_stock", rows), [1 + 0.75 * 2 / 3, 1 + 3**0.5 / 4 * 2 / 3], rtol=1e-6)


def test_model_stock_of_task_vectors_that_point_apart_is_the_base_unless_it_is_not_held(merged: Any) -> None:
    rows = [[1.0, 1.0], [2.0, 1.0], [0.5, 1 + 3**0.5 / 2]]  # 120 degrees: t = 2 * -0.5 / 0.5 = -2
    np.testing.assert_allclose(merged("model_stock", rows), [1, 1], rtol=1e-7)
    np.testing.assert_allclose(merged("model_stock", rows, clamp=False), [1 - 0.5, 1 - 3**0.5 / 2], rtol=1e-6)


def test_model_stock_by_rows(merged: Any) -> None:
    rows = [[0, 0, 0, 0], [1, 0, 1, 0], [1, 0, 0, 1]]  # rows at 0 and at 90 degrees
    got = merged("model_stock", rows, shape=(2, 2), filter_wise=True)
    np.testing.assert_allclose(got, [1, 0, 0, 0], atol=1e-7)


def test_magmax_takes_the_largest_change_and_the_first_of_equals(merged: Any) -> None:
    rows = [[1.0, 1.0, 1.0], [1.5, 0.0, 2.0], [1.25, 3.0, 0.0]]
    np.testing.assert_allclose(merged("magmax", rows), [1.5, 3, 2])
    np.testing.assert_allclose(merged("magmax", rows, lambda_=0.5), [1.25, 2, 1.5])


def test_ram_keeps_what_one_changed_and_averages_what_several_did(merged: Any) -> None:
    rows = [[0.0] * 4, [0.5, 0.25, 0.0, 0.125], [0.0, 0.75, 1e-6, -0.125]]
    np.testing.assert_allclose(merged("ram", rows, epsilon=1e-5), [0.5, 0.5, 0, 0], atol=1e-7)
    more = merged("ramplus_tl", rows, epsilon=1e-5, r=0.5, alpha=10.0)  # model 1: two shared, one its own
    np.testing.assert_allclose(more, [0.5 * (1 + 0.5 * 2), 0.5, 0, 0], atol=1e-7)
    capped = merged("ramplus_tl", rows, epsilon=1e-5, r=0.5, alpha=0.2)
    np.testing.assert_allclose(capped, [0.5 * 1.1, 0.5, 0, 0], atol=1e-7)


@pytest.mark.parametrize("scale", [1.0, 2.0**-20])
def test_sce_weighs_by_mean_square_however_small_the_changes(merged: Any, scale: float) -> None:
    rows = np.array([[0, 0, 0], [1, -1, 2], [3, 1, 0]]) * scale  # squares 6 and 10; signs +, + (an even split), +
    np.testing.assert_allclose(merged("sce", rows), np.array([(6 + 30) / 16, 1, 2]) * scale, rtol=1e-6)


def test_sce_selects_the_most_varying_entries_and_of_equals_the_first(merged: Any) -> None:
    rows = [[0.0] * 8, [1, 2, 5, 0, 2, 4, 4, 2], [1, 0, 5, 0, 0, 0, 0, 0]]  # deviations 0 1 0 0 1 2 2 1
    got = merged("sce", rows, select_topk=0.6)  # of five that differ, three
    np.testing.assert_allclose(got, [0, 2, 0, 0, 0, 4, 4, 0], atol=1e-7)
    np.testing.assert_allclose(merged("sce", rows, select_topk=0.1), ZERO[:8], atol=1e-7)


def test_arcee_fusion_takes_the_outliers() -> None:
    method = get_method("arcee_fusion")
    assert method is not None
    row = np.array([1, -2, 3, 4, -5, 6, 7, 8, -100]) / 64  # of a vector importance is |d|: 5 + 1.5 (7 - 3) = 11
    got = run_reference(method, to_raw(np.stack([np.ones(9), 1 + row]), "F32"), (9,))
    np.testing.assert_array_equal(got, np.where(np.abs(row) > 1, 1 + row, 1))
    random = np.random.default_rng(1)
    base, other = random.standard_normal((2, 40, 9)).astype(np.float32)
    p, q = (np.exp(x) / np.exp(x).sum(-1, keepdims=True) + 1e-8 for x in (other.astype(float), base.astype(float)))
    importance = np.abs(other - base) * (p * np.log(p / q)).sum(-1, keepdims=True)
    first, median, third = np.sort(importance.reshape(-1))[[89, 179, 269]]  # of 360
    taken = importance >= median + 1.5 * (third - first)
    assert 5 < taken.sum() < 80
    got = run_reference(method, np.stack([base, other]).reshape(2, -1), (40, 9)).reshape(40, 9)
    np.testing.assert_array_equal(got, np.where(taken, other, base))


def test_arcee_fusion_divergence_is_the_textbook_one_and_exact_where_it_is_small() -> None:
    random = np.random.default_rng(0)
    base = torch.from_numpy(random.standard_normal((3, 50)))
    for step, tolerance in ((2.0, 1e-12), (1e-2, 1e-8), (1e-4, 1e-4)):
        change = torch.from_numpy(random.standard_normal((3, 50))) * step
        p, q = (torch.softmax(x, -1) + 1e-8 for x in (base + change, base))
        got = divergence(base + change, base).squeeze(-1)
        np.testing.assert_allclose(got, (p * torch.log(p / q)).sum(-1), rtol=tolerance)
    assert (divergence(base, base) == 0).all()
    ratio = divergence(base + 1e-9 * change, base) / divergence(base + 1e-7 * change, base)
    np.testing.assert_allclose(ratio, 1e-4, rtol=1e-3)
