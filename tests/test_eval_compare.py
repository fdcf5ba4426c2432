"""The statistics of comparisons against scipy and by hand; results files, and what cannot be compared."""

from __future__ import annotations

import csv
import dataclasses
import io
import json
from pathlib import Path

import numpy as np
import pytest
import verdicts as made
from scipy import stats

from eval.compare import average, average_error, averaged, compare, parents
from eval.difference import AVERAGE, difference, differences, mcnemar
from eval.join import join
from eval.path import barrier
from eval.results import ScorePart
from eval.results_file import load_results
from eval.samples import read_samples
from eval.tables import as_csv, as_data, as_markdown, columns, notes, verdict
from eval.tasks.leaderboards import combine
from merge.errors import UsageError


@pytest.mark.parametrize(("gained", "lost"), [(0, 0), (1, 0), (3, 3), (10, 2), (0, 97), (400, 350), (5000, 4700)])
def test_mcnemar_is_the_exact_binomial_test(gained: int, lost: int) -> None:
    expected = stats.binomtest(gained, gained + lost).pvalue if gained + lost else 1.0
    assert mcnemar(gained, lost) == pytest.approx(expected, rel=1e-9)


def test_interval_is_that_of_scipys_paired_bootstrap() -> None:
    rng = np.random.default_rng(1)
    a = rng.random(120)
    b = a - 0.05 + 0.2 * rng.standard_normal(120)
    found = difference(made.model("a", [made.task("t", list(a))]), made.model("b", [made.task("t", list(b))]), "t")
    with_scipy = stats.bootstrap(
        (a, b), lambda x, y, axis: (x - y).mean(axis), paired=True, n_resamples=10_000, method="percentile", rng=0
    )
    assert found.value == pytest.approx((a - b).mean())
    assert found.low == pytest.approx(with_scipy.confidence_interval.low, abs=0.003)
    assert found.high == pytest.approx(with_scipy.confidence_interval.high, abs=0.003)
    assert found.p == pytest.approx(stats.ttest_rel(a, b).pvalue, abs=0.01)


def test_differences_by_hand() -> None:
    a = made.model("a", [made.task("t", [1.0, 1.0, 1.0, 0.0, 0.0])])
    b = made.model("b", [made.task("t", [1.0, 0.0, 0.0, 1.0, 0.0])])
    found = difference(a, b, "t")
    assert (found.value, found.gained, found.lost, found.n, found.p) == (pytest.approx(0.2), 2, 1, 5, 1.0)
    assert not found.significant
    mirrored = difference(b, a, "t")
    assert (mirrored.value, mirrored.gained, mirrored.lost) == (pytest.approx(-0.2), 1, 2)


@pytest.mark.parametrize("metric", ["bits_per_byte", "word_perplexity"])
def test_a_lower_loss_is_a_gain_in_the_metrics_own_unit(metric: str) -> None:
    losses = [(float(n), 4.0) for n in range(4, 24)]  # nats and words
    better = [(loss - 1.0, words) for loss, words in losses]
    a = made.model("a", [made.task("t", better, metric, better=False)])
    b = made.model("b", [made.task("t", losses, metric, better=False)])
    found = difference(a, b, "t")
    assert found.value == pytest.approx(b.tasks["t"].value - a.tasks["t"].value)
    assert found.value > 0
    assert (found.gained, found.lost) == (20, 0)
    assert found.low is not None
    assert found.high is not None
    assert 0 < found.low <= found.value <= found.high
    assert found.significant


def test_a_group_is_resampled_within_its_tasks() -> None:
    """Pooled items would vary with how many of each task are drawn; here every item of a task is the same."""
    one = [made.task("x", [0.9] * 30, group="g"), made.task("y", [0.1] * 10, group="g")]
    two = [made.task("x", [0.1] * 30, group="g"), made.task("y", [0.1] * 10, group="g")]
    for value in (0.7, 0.5):  # by items; the mean of the tasks
        groups = [
            dataclasses.replace(made.task("g", [1.0]), metrics={"acc,none": v}, doc_ids=(), items=())
            for v in (value, 0.1)
        ]
        a, b = made.model("a", [groups[0], *one]), made.model("b", [groups[1], *two])
        found = difference(a, b, "g")
        assert (found.low, found.value, found.high) == (pytest.approx(value - 0.1),) * 3
        assert (found.gained, found.lost, found.n) == (30, 0, 40)
    one = [made.task("x", [1.0] * 30, group="g"), made.task("y", [0.0] * 10, group="g")]
    two = [made.task("x", [0.0] * 30, group="g"), made.task("y", [0.0] * 10, group="g")]
    b = made.model("b", [dataclasses.replace(groups[1], metrics={"acc,none": 0.0}), *two])
    strange = dataclasses.replace(groups[0], metrics={"acc,none": 0.9})  # normalised in a way that is not known here
    found = difference(made.model("a", [strange, *one]), b, "g")
    assert (found.low, found.gained) == (None, 30)
    assert found.p == pytest.approx(mcnemar(30, 0))


def test_a_normalised_score_is_resampled_within_subtasks_scaled_and_cut_as_the_score_is() -> None:
    """Against plain loops over single items, with other draws."""
    rng = np.random.default_rng(5)
    chances = {"x": 1 / 2, "y": 1 / 5, "z": 1 / 3}
    wins = {"a": (0.55, 0.5, 0.3), "b": (0.5, 0.2, 0.35)}  # about chance: cut in some resamples
    sizes = (60, 90, 40)
    models = []
    for name, shares in wins.items():
        tasks = [
            made.task(task, list((rng.random(n) < p).astype(float)))
            for task, n, p in zip(chances, sizes, shares, strict=True)
        ]
        parts = [ScorePart(task, "acc,none", chance) for task, chance in chances.items()]
        models.append(made.model(name, [*tasks, combine("All", parts, {task.name: task for task in tasks})]))
    found = difference(*models, "All")
    items = [[np.array(model.tasks[task].items) for task in chances] for model in models]
    drawn = []
    for _ in range(4000):
        rows = [rng.integers(0, n, n) for n in sizes]
        scores = [
            np.mean([max(0, (x[r].mean() - b) / (1 - b)) for x, r, b in zip(side, rows, chances.values(), strict=True)])
            for side in items
        ]
        drawn.append(scores[0] - scores[1])
    low, high = np.quantile(drawn, (0.025, 0.975))
    assert found.value == pytest.approx(models[0].tasks["All"].value - models[1].tasks["All"].value)
    assert (found.low, found.high) == (pytest.approx(low, abs=0.012), pytest.approx(high, abs=0.012))
    assert found.why == ""
    assert found.n == sum(sizes)


def test_two_models_below_chance_score_the_same() -> None:
    models = [
        made.model(
            name,
            [task := made.task("x", [1.0] * right + [0.0] * (40 - right)), combine("X", [part], {"x": task})],
        )
        for name, right in (("a", 4), ("b", 2))
        for part in [ScorePart("x", "acc,none", 0.5)]
    ]
    found = difference(*models, "X")
    assert (found.value, found.low, found.high) == (0, 0, 0)
    assert found.p == mcnemar(2, 0)


def test_metrics_of_the_same_answers_are_drawn_together() -> None:
    """IFEval: instructions of one prompt each are the prompts, so both metrics are the same and so is the interval."""
    models = []
    for name, right in (("a", 30), ("b", 22)):
        items = [float(i < right) for i in range(50)]
        one = made.task("i", items, "prompt")
        one = dataclasses.replace(
            one,
            metrics=dict(one.metrics) | {"inst,none": one.value},
            also={"inst,none": tuple((x, 1.0) for x in items)},
        )
        both = combine("Both", [ScorePart("i", "prompt,none"), ScorePart("i", "inst,none")], {"i": one})
        models.append(made.model(name, [one, both]))
    single, both = (difference(*models, task) for task in ("i", "Both"))
    assert (both.low, both.high) == (pytest.approx(single.low), pytest.approx(single.high))


def test_why_there_is_no_interval_is_said() -> None:
    models = [
        made.model(
            name, [dataclasses.replace(made.task("f", [0.5], "f1"), items=(), doc_ids=()), made.task("t", [1.0, 0.0])]
        )
        for name in ("a", "b")
    ]
    found = compare(made.results(models), ["a"], ["b"])
    (merged,) = found.merges
    assert [gain.low for gain in merged.gains] == [None, None, None]
    assert notes(found) == [
        "No interval for f, average: its items have no score of their own.",
        "No interval for t: fewer than 6 items cannot show a difference at the 5 % level.",
    ]


def test_gains_over_the_best_parent_and_the_mean() -> None:
    found = compare(made.family({"a": (90, 20), "b": (30, 80), "merge": (80, 85)}))
    (merged,) = found.merges
    assert [parent.name for parent in merged.parents] == ["a", "b"]
    math, code, mean = merged.gains
    assert (math.best.other, math.best.value, math.over_mean) == ("a", pytest.approx(-0.1), pytest.approx(0.2))
    assert (code.best.other, code.best.value, code.over_mean) == ("b", pytest.approx(0.05), pytest.approx(0.35))
    assert (mean.task, mean.best.other, mean.best.value) == (AVERAGE, "a", pytest.approx(0.275))
    assert mean.significant
    assert verdict(found.results, merged).startswith(
        "merge is 27.5 points better on average than a, its best parent; the difference is s"
    )
    assert verdict(found.results, merged).endswith("It is above the best parent of each task on 1 of 2 tasks.")


def test_parents_that_were_not_measured_are_counted() -> None:
    results = made.family({"a": (50, 50), "merge": (60, 70)})
    models = [
        dataclasses.replace(model, parents=(*model.parents, "b", "c")) if model.parents else model
        for model in results.models
    ]
    (merged,) = compare(dataclasses.replace(results, models=tuple(models))).merges
    assert verdict(results, merged).endswith(" Only 1 of its 3 parents were measured.")
    (named,) = compare(made.family({"a": (50, 50), "merge": (60, 70)})).merges
    assert "Only" not in verdict(results, named)


def test_average_has_the_interval_and_error_of_independent_tasks() -> None:
    found = made.family({"a": (50, 50), "merge": (60, 70)})
    a, merge = found.models
    (one,) = differences(merge, [a], found.tasks)
    assert one.low is not None
    assert one.high is not None
    steps = [np.array([float(50 <= i < top) for i in range(100)]) for top in (60, 70)]
    error = np.hypot(*(step.std() / 10 for step in steps)) / 2
    assert one.high - one.low == pytest.approx(2 * 1.96 * error, rel=0.06)
    assert average_error(found, a) == pytest.approx(0.05 / np.sqrt(2))


def test_merge_and_parents_are_found_or_named() -> None:
    base = made.family({"a": (1, 2), "b": (2, 3), "merge": (4, 5)})
    assert [parent.name for parent in compare(base, ["merge"], ["b"]).merges[0].parents] == ["b"]
    assert [merged.model for merged in compare(base, (), ["a", "b"]).merges] == [base.models[2]]
    with pytest.raises(UsageError, match='no results for "c"; there are: a, b, merge'):
        compare(base, ["c"])
    with pytest.raises(UsageError, match=r"no parent of a is among b, merge. Name them: --parents"):
        compare(base, ["a"])
    plain = dataclasses.replace(base, models=tuple(dataclasses.replace(one, parents=()) for one in base.models))
    with pytest.raises(UsageError, match=r"which is the merge of b, merge\? Say --merge NAME"):
        compare(plain, (), ["a"])
    assert compare(dataclasses.replace(base, models=base.models[:2])).merges == ()


def test_all_merges_are_compared_but_not_what_they_are_made_of() -> None:
    """An adapter has a parent, its base, and is no merge where a merge of it is there."""
    base = made.family({"a": (1, 2), "b": (2, 3), "merge": (4, 5)})
    a, b, merge = base.models
    adapter = dataclasses.replace(b, parents=("a",))
    second = dataclasses.replace(merge, name="other", digest="d", parents=("b",))
    found = compare(dataclasses.replace(base, models=(a, adapter, merge, second)))
    assert [merged.model.name for merged in found.merges] == ["merge", "other"]
    assert [[parent.name for parent in merged.parents] for merged in found.merges] == [["a", "b"], ["b"]]
    assert as_markdown(found).count("| over the best parent |") == 2
    assert [each["merge"] for each in as_data(found)["merges"]] == ["merge", "other"]
    alone = compare(dataclasses.replace(base, models=(a, adapter)))
    assert [merged.model.name for merged in alone.merges] == ["b"]


def test_an_average_is_of_shares_alone() -> None:
    models = [
        made.model(name, [made.task("x", [1.0, right]), made.task("y", [right]), bits], ["a"] * (name == "merge"))
        for name, right, bits in (
            ("a", 0.0, made.task("bits", [(1.5, 1.0)], "bits_per_byte", better=False)),
            ("merge", 1.0, made.task("bits", [(1.2, 1.0)], "bits_per_byte", better=False)),
        )
    ]
    found = made.results(models)
    assert averaged(found) == ("x", "y")
    assert [average(found, model) for model in found.models] == [0.25, 1.0]
    assert columns(found)[-1] == (AVERAGE, "of 2 tasks")
    assert [gain.task for gain in compare(found).merges[0].gains] == ["x", "y", "bits", AVERAGE]


def test_parents_are_found_by_directory_before_name(tmp_path: Path) -> None:
    wanted, other = tmp_path / "x" / "math", tmp_path / "y" / "math"
    items = [made.task("t", [1.0])]
    near = dataclasses.replace(made.model("y/math", items), path=str(other))
    right = dataclasses.replace(made.model("x/math", items), path=str(wanted))
    merge = made.model("m", items, [str(wanted)])
    assert parents(made.results([near, right, merge]), merge) == [right]


def test_results_survive_json(tmp_path: Path) -> None:
    loss = made.task("loss", [(3.5, 2.0), (1.25, 4.0)], "bits_per_byte", better=False)
    before = made.results([made.model("a", [made.task("t", [1.0, 0.0]), loss])], path=[0.5])
    (tmp_path / "r.json").write_text(before.to_json(), encoding="utf-8")
    assert load_results(tmp_path / "r.json") == before


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"format": 1}', '{"format": 2, "models": 5}', "\x00"])
def test_other_files_are_no_results(tmp_path: Path, text: str) -> None:
    (tmp_path / "r.json").write_text(text)
    with pytest.raises(UsageError, match=r"r\.json: holds no results of merge eval"):
        load_results(tmp_path / "r.json")


def test_files_are_joined_and_what_was_asked_otherwise_is_refused() -> None:
    one, two = made.family({"a": (1, 2)}), made.family({"a": (3, 4), "merge": (5, 6)})
    both, notes = join([(Path("x.json"), one), (Path("y.json"), two)])
    assert [model.name for model in both.models] == ["a", "merge"]  # the digests of a are equal
    assert notes == ()
    half = dataclasses.replace(two, settings=dict(two.settings) | {"dtype": "float16"})
    both, _ = join([(Path("x.json"), one), (Path("y.json"), half)])
    assert [model.name for model in both.models] == ["a", "a (y)", "merge"]  # the same weights, other answers
    other = dataclasses.replace(two.models[0], digest="else")
    both, _ = join([(Path("x.json"), one), (Path("y.json"), dataclasses.replace(two, models=(other,)))])
    assert [model.name for model in both.models] == ["a", "a (y)"]
    fewer = dataclasses.replace(one, tasks=("math",))
    assert join([(Path("x.json"), fewer), (Path("y.json"), two)])[1] == ("y.json: code left out: not in all files.",)
    limited = dataclasses.replace(two, settings={"limit": 5, "seed": 0})
    with pytest.raises(UsageError, match=r"y.json: limit is 5, in x.json None: not the same evaluation"):
        join([(Path("x.json"), one), (Path("y.json"), limited)])
    newer = dataclasses.replace(two.models[0].tasks["math"], version="2")
    changed = dataclasses.replace(two.models[0], tasks=dict(two.models[0].tasks) | {"math": newer})
    with pytest.raises(UsageError, match=r"y.json: task math has version 2, in x.json 1"):
        join([(Path("x.json"), one), (Path("y.json"), dataclasses.replace(two, models=(changed,)))])
    with pytest.raises(UsageError, match="no task is in all of them"):
        join(
            [
                (Path("x.json"), dataclasses.replace(one, tasks=("math",))),
                (Path("y.json"), dataclasses.replace(two, tasks=("code",))),
            ]
        )


def sample(number: int, **values: object) -> dict[str, object]:
    given = {"doc_id": number, "arguments": [("q: x\n\nq: y", " no"), ("q: x\n\nq: y", " yes")], "target": 1}
    return given | {"filtered_resps": [(-1.0, False), (-2.5, False)], "filter": "none"} | values


def test_items_of_lm_eval_are_read_by_metric() -> None:
    found = read_samples([sample(3, acc=1.0), sample(5, acc=0.0)], "acc,none", 0.5)
    assert (found.doc_ids, found.items, found.answers) == ((3, 5), (1.0, 0.0), ("no", "no"))
    assert found.questions == {"3": ("q: y", "yes"), "5": ("q: y", "yes")}
    loss = [sample(0, bits_per_byte=(-3.0, 4)), sample(1, bits_per_byte=(-5.0, 4))]
    assert read_samples(loss, "bits_per_byte,none", 1 / np.log(2)).items == ((3.0, 4.0), (5.0, 4.0))
    # Gold and prediction, of which the metric makes one number over all items.
    assert read_samples([sample(0, f1=(1, 1)), sample(1, f1=(0, 1))], "f1,none", 0.67).items == ()
    # Scores that do not make up the task's score: nothing is said of single items.
    assert read_samples([sample(0, acc=1.0)], "acc,none", 0.5).items == ()
    # Of several filters the metric's.
    strict = [sample(0, acc=1.0, filter="strict"), sample(0, acc=0.0, filter="loose")]
    assert read_samples(strict, "acc,strict", 1.0).items == (1.0,)


def test_barrier_is_over_the_line_between_the_ends() -> None:
    places = [0.0, 0.5, 1.0]
    losses = [1.0, 3.5, 2.0]
    models = [
        made.model(str(t), [made.task("t", [(x, 1.0)], "bits_per_byte", better=False)])
        for t, x in zip(places, losses, strict=True)
    ]
    found = barrier(made.results(models, places), "t")
    assert (found.height, found.at, found.best) == (pytest.approx(2.0 / np.log(2)), 0.5, 0.0)
    rights = [
        made.model(str(t), [made.task("t", [float(i < n) for i in range(10)])])
        for t, n in zip(places, (8, 9, 6), strict=True)
    ]
    found = barrier(made.results(rights, places), "t")
    assert (found.height, found.best) == (0.0, 0.5)


def test_outputs_for_machines_and_for_cards_agree() -> None:
    found = compare(made.family({"a": (90, 20), "b|c": (30, 80), "merge": (80, 85)}))
    rows = list(csv.DictReader(io.StringIO(as_csv(found))))
    assert [(row["model"], row["task"], row["value"]) for row in rows][-1] == ("merge", "code", "0.85")
    assert float(rows[-1]["over_best_parent"]) == pytest.approx(0.05)
    assert rows[0]["p"] == ""
    data = json.loads(json.dumps(as_data(found)))
    assert data["merges"][0]["parents"] == ["a", "b|c"]
    assert data["merges"][0]["gains"][1]["best"]["gained"] == 5
    lines = as_markdown(found).splitlines()
    assert lines[0] == "| model | math (acc, n = 100) | code (acc, n = 100) | average |"
    assert lines[3] == r"| b\|c | 30.0 ± 4.6 | 80.0 ± 4.0 | 55.0 ± 3.0 |"
    assert lines[4] == "| merge | 80.0 ± 4.0 | **85.0 ± 3.6** | **82.5 ± 2.7** |"


def test_few_and_many_different_scores_are_resampled_alike() -> None:
    """Right-or-wrong items are drawn by counts; with a little noise they are drawn one by one."""
    rng = np.random.default_rng(3)
    a, b = ((rng.random(200) < share).astype(float) for share in (0.7, 0.6))
    noise = 1e-9 * rng.random(200)
    counted = difference(made.model("a", [made.task("t", list(a))]), made.model("b", [made.task("t", list(b))]), "t")
    drawn = difference(
        made.model("a", [made.task("t", list(a + noise))]), made.model("b", [made.task("t", list(b))]), "t"
    )
    assert counted.low == pytest.approx(drawn.low, abs=0.006)
    assert counted.high == pytest.approx(drawn.high, abs=0.006)
    expected = (a - b).mean() - 1.96 * (a - b).std() / np.sqrt(200)
    assert counted.low == pytest.approx(expected, abs=0.01)
