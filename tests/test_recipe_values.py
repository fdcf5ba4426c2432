"""Settings -> one number, as methods.md has it: gradients, filters, levels."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from merge.recipe import Conditional, evaluate, resolve

numbers = st.floats(-1e6, 1e6)
places = st.floats(0, 1)
names = st.text("abM._", max_size=12)


@pytest.mark.parametrize(("t", "value"), [(0, 0), (0.125, 0.25), (0.25, 0.5), (0.5, 0.3), (0.875, 0.85), (1, 1)])
def test_a_gradient_is_linear_between_its_points(t: float, value: float) -> None:
    assert evaluate((0.0, 0.5, 0.3, 0.7, 1.0), "", t) == pytest.approx(value, abs=1e-15)


@pytest.mark.parametrize(("t", "value"), [(0, "a"), (0.49, "a"), (0.5, "b"), (0.99, "b"), (1, "c")])
def test_words_and_booleans_are_picked_by_floor(t: float, value: str) -> None:
    assert evaluate(("a", "b", "c"), "", t) == value
    assert evaluate((True, False), "", t) is (t < 1)


@given(st.lists(numbers, min_size=1, max_size=9), st.integers(1, 8), st.data())
def test_layer_i_of_l_gets_the_value_at_i_over_l_minus_1(points: list[float], last: int, data: st.DataObject) -> None:
    layer = data.draw(st.integers(0, last))
    value = evaluate(tuple(points), "", layer / last)
    place = layer * (len(points) - 1) / last
    low = math.floor(place)
    high = min(low + 1, len(points) - 1)
    assert value == pytest.approx(points[low] + (place - low) * (points[high] - points[low]), rel=1e-9, abs=1e-6)


@given(st.lists(numbers, min_size=1, max_size=9))
def test_the_ends_of_a_gradient_are_exact(points: list[float]) -> None:
    assert evaluate(tuple(points), "", 0.0) == points[0]
    assert evaluate(tuple(points), "", 1.0) == points[-1]


@given(numbers, places)
def test_one_point_is_a_constant(point: float, t: float) -> None:
    assert evaluate((point,), "x", t) == evaluate(point, "x", t) == point


@given(st.lists(st.tuples(st.none() | st.just("*") | names, numbers), min_size=1, max_size=6), names)
def test_the_first_filter_that_is_in_the_name_wins(pairs: list[tuple[str | None, float]], name: str) -> None:
    conditions = tuple(Conditional(pattern, value) for pattern, value in pairs)
    expected = [value for pattern, value in pairs if pattern in (None, "*") or str(pattern) in name]
    assert evaluate(conditions, name, 0.5) == (expected[0] if expected else None)


def test_filters_are_case_sensitive() -> None:
    assert evaluate((Conditional("MLP", 1.0),), "model.layers.0.mlp.up_proj.weight", 0) is None


@given(st.lists(st.dictionaries(st.sampled_from("wd"), numbers), max_size=4), st.sampled_from("wd"))
def test_the_innermost_level_that_has_a_value_wins(levels: list[dict[str, float]], key: str) -> None:
    expected = [level[key] for level in levels if key in level]
    assert resolve(levels, key, "x", 0) == (expected[0] if expected else None)


def test_no_match_falls_through_to_the_next_level() -> None:
    levels = [{"w": (Conditional("mlp", 1.0),)}, {"w": (Conditional("attn", (2.0, 4.0)),)}, {"w": 3.0}]
    assert resolve(levels, "w", "layers.0.mlp.x", 0.5) == 1.0
    assert resolve(levels, "w", "layers.0.attn.x", 0.5) == 3.0
    assert resolve(levels, "w", "lm_head", 0.5) == 3.0
    assert resolve(levels[:2], "w", "lm_head", 0.5) is None
