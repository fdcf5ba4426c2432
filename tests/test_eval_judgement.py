"""What a comparison may claim: exact tests at any number of items; the choice of the best parent and families count."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import verdicts as made
from scipy import stats

from eval.compare import compare
from eval.difference import Difference, differences
from eval.gate import Gate, gates
from eval.resampling import DRAWS, bounds, p_values
from eval.results import Results, wilson
from eval.tables import cells, verdict
from merge.errors import UsageError


def pair(a: list[float], b: list[float], metric: str = "acc") -> Difference:
    models = [made.model(name, [made.task("t", items, metric)]) for name, items in (("a", a), ("b", b))]
    return differences(models[0], models[1:], ["t"])[0]


@pytest.mark.parametrize("n", [2, 5, 9, 12])
def test_p_of_few_items_is_that_of_all_sign_flips(n: int) -> None:
    rng = np.random.default_rng(n)
    a, b = rng.random(n), rng.random(n) - 0.2
    steps = a - b
    sums = [abs(np.dot(signs, steps)) for signs in itertools.product((1, -1), repeat=n)]
    expected = np.mean(np.array(sums) >= abs(steps.sum()) - 1e-9)
    assert pair(list(a), list(b)).p == pytest.approx(expected, abs=1e-12)


def test_p_of_many_items_is_that_of_scipys_permutation_test() -> None:
    rng = np.random.default_rng(0)
    a = rng.random(60)
    b = a - 0.04 + 0.2 * rng.standard_normal(60)
    expected = stats.permutation_test(
        (a, b), lambda x, y, axis: (x - y).mean(axis), permutation_type="samples", n_resamples=20_000, rng=1
    ).pvalue
    assert 0.01 < expected < 0.5
    assert pair(list(a), list(b)).p == pytest.approx(expected, abs=0.015)


def test_two_equal_perplexities_over_different_words_are_exchanged_with_their_weights() -> None:
    """One long and many short texts: the ratio of sums is tested, not the mean of ratios."""
    lengths = [400.0] + [4.0] * 9
    losses = [(2.0 * words + 0.1 * i, words) for i, words in enumerate(lengths)]
    better = [(loss - (30.0 if words == 400 else -0.1), words) for loss, words in losses]
    models = [
        made.model(name, [made.task("t", items, "bits_per_byte", better=False)])
        for name, items in (("a", better), ("b", losses))
    ]
    (found,) = differences(models[0], models[1:], ["t"])
    assert found.value > 0
    assert (
        found.p == 1.0
    )  # the long text alone makes the sign: every exchange has as large a difference or its opposite


def test_five_items_cannot_be_significant_and_six_can() -> None:
    five = pair([1.0 + 0.01 * i for i in range(5)], [0.0] * 5)
    assert (five.p, five.significant, five.low) == (2 / 2**5, False, None)
    assert "fewer than 6 items" in five.why
    six = pair([1.0 + 0.01 * i for i in range(6)], [0.0] * 6)
    assert (six.p, six.significant) == (2 / 2**6, True)
    assert (six.low, six.high) == (pytest.approx(1.0), pytest.approx(1.05))


def test_interval_excludes_zero_just_when_the_test_rejects() -> None:
    """For plain means both come from the same halves; all subsets of 11 items."""
    rng = np.random.default_rng(2)
    seen = set()
    for shift in np.linspace(0, 1.5, 30):
        found = pair(list(rng.standard_normal(11) + shift), [0.0] * 11)
        assert found.low is not None
        assert found.high is not None
        assert found.p is not None
        assert (found.low > 0 or found.high < 0) == (found.p < 0.05), shift
        seen.add(found.significant)
    assert seen == {True, False}


def test_models_that_agree_on_twenty_items_are_not_equal_for_sure() -> None:
    found = pair([1.0] * 20, [1.0] * 20)
    assert (found.value, found.p) == (0.0, 1.0)
    assert found.low is not None
    assert found.low == pytest.approx(-(found.high or 0))
    assert -0.2 < found.low < -0.05


def test_max_t_is_one_test_of_all_rivals() -> None:
    """Two rivals whose differences are the same cost nothing; independent ones cost about twice."""
    rng = np.random.default_rng(0)
    draws = rng.standard_normal((4, DRAWS))
    (alone, same), _ = p_values([(2.1, draws[0]), (2.1, draws[0])])
    assert alone == same == pytest.approx(2 * stats.norm.sf(2.1), abs=0.01)
    found = p_values([(2.1, row) for row in draws])
    assert found[0][1] == pytest.approx(1 - (1 - alone) ** 4, abs=0.02)
    scaled = p_values([(2.1 * unit, unit * row) for unit, row in zip((1, 5, 0.1, 1e-6), draws, strict=True)])
    assert scaled[3][1] == pytest.approx(found[3][1], abs=1e-9)  # each in its own unit


def noisy(merge: float, parents: list[float], n: int = 400, merges: int = 1, seed: int = 0) -> Results:
    rng = np.random.default_rng(seed)
    names = [f"p{i}" for i in range(len(parents))]
    models = [made.model(f"m{i}", [made.task("t", list(merge + rng.random(n)))], names) for i in range(merges)]
    models += [
        made.model(name, [made.task("t", list(x + rng.random(n)))]) for name, x in zip(names, parents, strict=True)
    ]
    return made.results(models)


def test_better_than_the_best_parent_is_better_than_every_parent() -> None:
    (merged,) = compare(noisy(0.06, [0.0, 0.02, 0.01])).merges
    (gain,) = merged.gains
    assert gain.p == max(one.p for one in gain.each if one.p is not None)
    assert gain.low == min(one.low for one in gain.each if one.low is not None)
    assert gain.best.value > 0


def test_worse_than_the_best_parent_counts_the_parents_that_were_looked_at() -> None:
    (merged,) = compare(noisy(0.0, [0.02, 0.03, 0.025, 0.02])).merges
    (gain,) = merged.gains
    assert gain.best.value < 0
    assert gain.best.p is not None
    assert gain.p == gain.best.p_among
    assert gain.p is not None
    assert gain.best.p < gain.p < 4 * gain.best.p + 0.02
    assert gain.high is not None
    assert gain.high >= min(one.high for one in gain.each if one.high is not None)


def test_equal_merges_of_equal_parents_are_rarely_called_worse(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a correction four parents make it about 12 %; the bound is four standard errors above 5 %."""
    monkeypatch.setattr("eval.resampling.DRAWS", 999)
    rng = np.random.default_rng(0)
    called = pairs = 0
    repeats = 120
    for seed in rng.integers(0, 2**31, repeats):
        (merged,) = compare(noisy(0.0, [0.0] * 4, n=40, seed=int(seed))).merges
        called += merged.gains[0].significant
        pairs += merged.gains[0].best.p is not None and merged.gains[0].best.p < 0.05
    assert called <= pairs
    assert called / repeats < 0.05 + 4 * (0.05 * 0.95 / repeats) ** 0.5


def test_gains_shown_together_are_corrected_by_holm() -> None:
    comparison = compare(noisy(0.05, [0.0], merges=3))
    ps = [merged.gains[0].p for merged in comparison.merges]
    adjusted = [merged.gains[0].p_adjusted for merged in comparison.merges]
    order = np.argsort(ps)
    expected = np.maximum.accumulate([min(1.0, (3 - rank) * ps[place]) for rank, place in enumerate(order)])
    assert [adjusted[place] for place in order] == pytest.approx(list(expected))
    (single,) = compare(noisy(0.05, [0.0])).merges
    assert single.gains[0].p_adjusted == single.gains[0].p


def test_tasks_and_averages_are_two_families() -> None:
    comparison = compare(made.family({"a": (60, 50), "merge": (75, 52)}))
    math, code, mean = comparison.merges[0].gains
    assert mean.p_adjusted == mean.p
    assert math.p is not None
    assert math.p_adjusted == pytest.approx(2 * math.p)
    assert code.p_adjusted == code.p


def test_nothing_is_said_of_the_significance_of_equal_scores() -> None:
    comparison = compare(made.family({"a": (50, 50), "merge": (50, 50)}))
    said = verdict(comparison.results, comparison.merges[0])
    assert "the same as" in said
    assert "significant" not in said


@pytest.mark.parametrize(("right", "n"), [(20, 20), (0, 20), (3, 40), (499, 500)])
def test_wilson_is_scipys(right: int, n: int) -> None:
    expected = stats.binomtest(right, n).proportion_ci(method="wilson")
    assert wilson(right, n) == (pytest.approx(expected.low, abs=1e-6), pytest.approx(expected.high, abs=1e-6))


def test_scores_at_the_ends_have_an_interval_and_no_zero_error() -> None:
    results = made.family({"a": (20, 10), "merge": (20, 16)}, n=20)
    shown = [[str(cell) for cell in row] for row in cells(results)]
    assert shown[0][:2] == ["100.0 (83.9–100.0)", "50.0 ± 11.2"]
    assert shown[1][1] == "80.0 (58.4–91.9)"
    assert shown[0][2] == "75.0 ± 6.0"  # hypot(0.0411, 0.1118) / 2: the first error is the interval's, not 0


def test_bounds_of_few_halves_are_their_ends() -> None:
    assert bounds(np.arange(63.0)) == (0.0, 62.0)
    assert bounds(np.arange(9999.0)) == (249.0, 9749.0)


def gate_of(results: Results, against: str | None = None) -> Gate:
    return gates(compare(results), against)[0]


def test_the_gate_passes_if_the_mean_rises_and_no_task_falls_significantly() -> None:
    found = gate_of(made.family({"a": (60, 60), "merge": (75, 58)}))
    assert found.passed
    assert str(found) == "gate: merge against a: passed. The mean rises and no task falls significantly."


def test_the_gate_names_what_falls() -> None:
    found = gate_of(made.family({"a": (60, 60), "merge": (95, 40)}))
    assert not found.passed
    assert [one.task for one in found.fallen] == ["code"]
    assert str(found).startswith("gate: merge against a: not passed. Code falls by 0.2 (p = ")
    flat = gate_of(made.family({"a": (60, 60), "merge": (60, 60)}))
    assert (flat.passed, flat.fallen) == (False, ())
    assert str(flat).endswith("not passed. The mean does not rise.")


def test_the_gate_is_against_the_best_parent_or_a_named_model() -> None:
    results = made.family({"a": (90, 20), "b": (30, 70), "merge": (80, 75)})
    assert gate_of(results).against == "a"
    assert not gate_of(results, "a").passed
    assert gate_of(results, "b").passed
    with pytest.raises(UsageError, match='no results for "c"'):
        gate_of(results, "c")
    with pytest.raises(UsageError, match="this is the merge itself"):
        gate_of(results, "merge")


def test_the_gate_decides_the_exit_code(call_cli: Callable[..., Any], tmp_path: Path) -> None:
    for name, scores in (("good", (75, 62)), ("bad", (40, 62))):
        (tmp_path / f"{name}.json").write_text(made.family({"a": (60, 60), "merge": scores}).to_json())
    assert call_cli(["compare", "good.json", "--gate"]).code == 0
    bad = call_cli(["compare", "bad.json", "--gate", "--json"])
    assert bad.code == 1
    assert json.loads(bad.stdout)["gates"][0]["passed"] is False
    (tmp_path / "single.json").write_text(made.family({"a": (60, 60)}).to_json())
    assert call_cli(["compare", "single.json", "--gate"]).code == 2
