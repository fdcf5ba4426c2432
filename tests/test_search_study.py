"""Searches on toy objectives: the same trials for the same seed, over kills and processes; constraints; goals."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from eval.search.judges import Candidate, FunctionJudge
from eval.search.objective import Scores, SearchGoal, TaskScore
from eval.search.record import SearchRow
from eval.search.run import Found, search
from eval.search.space import Space
from merge.errors import MergeError, UsageError

FAMILY = Path(__file__).parent.parent / "recipes" / "quickstart"
FILE = str(FAMILY.parent / "open.yaml")
TEXT = """\
merge_method: task_arithmetic
base_model: quickstart/base
models:
  - {model: quickstart/reverse, parameters: {weight: {search: [0, 1]}}}
  - {model: quickstart/sort, parameters: {weight: {search: [0, 1]}}}
"""
TOY = textwrap.dedent(
    f"""
    import os, sys
    from eval.search.run import search
    from eval.search.space import Space

    def toy(candidate):
        x, y = (candidate.values.get(name, 1.0) for name in ("reverse.weight", "sort.weight"))
        toy.calls += 1
        if toy.calls == int(sys.argv[3]):
            os.kill(os.getpid(), 9)
        return -(x - 0.3) ** 2 - (y - 0.7) ** 2

    toy.calls = 0
    search(Space.parse({TEXT!r}, {FILE!r}), toy, out=sys.argv[1], trials=int(sys.argv[2]), seed=3, sampler=sys.argv[4])
    """
)


def toy(candidate: Candidate) -> float:
    x, y = (float(candidate.values.get(name, 1.0) or 0) for name in ("reverse.weight", "sort.weight"))
    return -((x - 0.3) ** 2) - (y - 0.7) ** 2


def toys(candidate: Candidate) -> dict[str, float]:
    x, y = (float(candidate.values.get(name, 1.0) or 0) for name in ("reverse.weight", "sort.weight"))
    return {"a": 1 - x, "b": 1 - (y - x) ** 2}


def found(tmp_path: Path, judge: Any = toy, name: str = "out", **asked: Any) -> Found:
    return search(Space.parse(TEXT, FILE), judge, out=tmp_path / name, **({"trials": 6, "seed": 3} | asked))


def trials(result: Found) -> list[tuple[Any, ...]]:
    return [(row.number, dict(row.written), row.values, row.state) for row in result.rows if row.kind == "trial"]


def in_processes(tmp_path: Path, sampler: str, *runs: Sequence[int]) -> list[subprocess.Popen[bytes]]:
    """Starts a process for each of (trials, call at which it kills itself)."""
    script = tmp_path / "toy.py"
    script.write_text(TOY)
    environment = os.environ | {"PYTHONPATH": str(FAMILY.parent.parent)}
    return [
        subprocess.Popen([sys.executable, script, tmp_path / "killed", str(n), str(at), sampler], env=environment)
        for n, at in runs
    ]


def test_the_best_is_near_the_optimum_and_a_plain_recipe(tmp_path: Path) -> None:
    result = found(tmp_path, trials=16)
    assert result.best is not None
    assert result.best.values[0] == max(row.values[0] for row in result.rows if row.recipe) > -0.03
    assert result.recipe == Space.parse(TEXT, FILE).recipe(result.best.written).text
    assert [row.kind for row in result.rows[:5]] == ["parent"] * 3 + ["default"] * 2


@pytest.mark.parametrize("sampler", ["tpe", "nsga2"])
def test_the_same_seed_gives_the_same_trials_and_another_others(tmp_path: Path, sampler: str) -> None:
    one, two = (found(tmp_path, name=name, sampler=sampler) for name in ("one", "two"))
    assert trials(one) == trials(two)
    assert len({row[1]["sort.weight"] for row in trials(one)}) == 6
    assert trials(found(tmp_path, name="other", sampler=sampler, seed=4))[0] != trials(one)[0]


@pytest.mark.parametrize("sampler", ["tpe", pytest.param("cmaes", marks=pytest.mark.full)])
def test_a_search_killed_twice_has_the_same_trials_as_one_that_was_not(tmp_path: Path, sampler: str) -> None:
    for at in (8, 4):
        (process,) = in_processes(tmp_path, sampler, (11, at))
        assert process.wait() == -9
    resumed = found(tmp_path, name="killed", sampler=sampler, trials=11)
    whole = found(tmp_path, name="whole", sampler=sampler, trials=11)
    assert trials(resumed) == trials(whole)
    assert len(trials(whole)) == 11


def test_a_larger_budget_goes_on_and_a_smaller_one_has_nothing_to_do(tmp_path: Path) -> None:
    whole = found(tmp_path, name="whole")
    found(tmp_path, trials=3)
    assert trials(found(tmp_path, trials=6)) == trials(whole)
    assert trials(found(tmp_path, trials=2)) == trials(whole)


def test_two_processes_share_a_study(tmp_path: Path) -> None:
    processes = in_processes(tmp_path, "tpe", (12, 0), (12, 0))
    assert [process.wait() for process in processes] == [0, 0]
    result = found(tmp_path, name="killed", trials=12)
    rows = trials(result)
    assert [row[0] for row in rows] == sorted(row[0] for row in rows)
    assert len(rows) == 12
    assert {row[3] for row in rows} == {"whole"}


def test_a_study_of_something_else_is_refused_and_left_alone(tmp_path: Path) -> None:
    before = found(tmp_path)
    with pytest.raises(UsageError, match="holds a search with another seed; nothing was changed"):
        found(tmp_path, seed=4)
    with pytest.raises(UsageError, match="holds a search with another recipe"):
        search(Space.parse(TEXT.replace("[0, 1]", "[0, 2]"), FILE), toy, out=tmp_path / "out", seed=3)
    (tmp_path / "file").mkdir()
    (tmp_path / "file" / "study.sqlite").write_text("no database")
    with pytest.raises(UsageError, match=r"study\.sqlite: cannot be used as a study"):
        found(tmp_path, name="file")
    assert trials(found(tmp_path)) == trials(before)


def test_a_grid_asks_every_point_once(tmp_path: Path) -> None:
    grid = [{"reverse.weight": x, "sort.weight": y} for x in (0.0, 0.5, 1.0) for y in (0.0, 1.0)]
    result = found(tmp_path, sampler="grid", grid=grid, trials=None)
    assert [row[1] for row in trials(result)] == grid


def test_no_task_falls_by_more_than_is_allowed(tmp_path: Path) -> None:
    """Unconstrained the best has x = 0.5 in the mean of 1 - x and 1 - (y - x)^2 ... and b of the base is 1."""
    judge = FunctionJudge(lambda candidate: {"a": candidate_a(candidate), "b": candidate_b(candidate)}, ("a", "b"))
    free = found(tmp_path, judge, "free", trials=16)
    bound = found(tmp_path, judge, "bound", trials=16, goal=SearchGoal(max_fall=0.1))
    assert free.best is not None
    assert bound.best is not None
    assert free.best.scores["b"].value < 0.8
    assert bound.best.scores["b"].value >= 0.9 - 1e-9
    assert bound.best.violation <= 0 < max(row.violation for row in bound.rows)
    feasible = [row for row in bound.rows if row.recipe and row.violation <= 0]
    assert bound.best.values == max(row.values for row in feasible)


def candidate_a(candidate: Candidate) -> float:
    return 2 * float(candidate.values.get("reverse.weight") or 0)


def candidate_b(candidate: Candidate) -> float:
    return 1 - float(candidate.values.get("reverse.weight") or 0)


def test_a_front_is_what_no_other_beats(tmp_path: Path) -> None:
    judge = FunctionJudge(toys, ("a", "b"))
    result = found(tmp_path, judge, trials=16, goal=SearchGoal("pareto"))
    assert result.front
    for row in result.front:
        assert not any(other.beats(row) for other in result.rows)
        better = [o for o in result.rows if o.recipe and all(m > t for m, t in zip(o.values, row.values, strict=True))]
        assert not better
    with pytest.raises(UsageError, match="--sampler cmaes: has one objective"):
        found(tmp_path, judge, "other", sampler="cmaes", goal=SearchGoal("pareto"))


def test_goals_of_several_tasks() -> None:
    def scores(**values: float) -> Scores:
        return {task: TaskScore(value) for task, value in values.items()}

    one = scores(a=0.6, b=0.3)
    assert SearchGoal("mean").values(one) == pytest.approx((0.45,))
    assert SearchGoal("mean", {"a": 3.0}).values(one) == pytest.approx((0.525,))
    assert SearchGoal("worst").values(one) == (0.3,)
    assert SearchGoal("pareto").values(one) == (0.6, 0.3)
    parents = {"a": 0.5, "b": 0.6}
    assert SearchGoal("gain", parents=parents).values(one) == pytest.approx(((0.2 - 0.5) / 2,))
    loss: Mapping[str, TaskScore] = {"text": TaskScore(2.0, metric="bits_per_byte", higher_is_better=False)}
    assert SearchGoal("mean").values(loss) == (-2.0,)
    with pytest.raises(UsageError, match="have no common scale"):
        SearchGoal("mean").check({**one, **loss})
    SearchGoal("gain").check({**one, **loss})
    assert SearchGoal(max_fall=0.1, reference={"a": 0.8, "b": 0.3}).violation(one) == pytest.approx(0.1)


def test_what_is_no_number_is_refused(tmp_path: Path) -> None:
    with pytest.raises(MergeError, match=r"the objective gave nan for objective; expected a finite number"):
        found(tmp_path, lambda candidate: float("nan"))
    with pytest.raises(MergeError, match="the objective failed on base: ZeroDivisionError"):
        found(tmp_path, lambda candidate: 1 / 0)
    with pytest.raises(UsageError, match="has no open place"):
        search(Space.parse(TEXT.replace("{search: [0, 1]}", "1"), FILE), toy, out=tmp_path / "none")


def test_a_recipe_that_these_models_do_not_allow_is_a_trial_that_was_refused(tmp_path: Path) -> None:
    text = TEXT.replace("task_arithmetic", "linear").replace("base_model: quickstart/base\n", "")
    space = Space.parse(text.replace("[0, 1]", "[-1, 1]"), FILE)
    grid = [{"reverse.weight": 0.5, "sort.weight": -0.5}, {"reverse.weight": 0.5, "sort.weight": 0.5}]
    result = search(space, toy, out=tmp_path / "out", sampler="grid", grid=grid)
    refused, whole = (row for row in result.rows if row.kind == "trial")
    assert "sum to zero" in refused.refused
    assert (refused.state, whole.state) == ("refused", "whole")


def test_progress_tells_every_step(tmp_path: Path) -> None:
    said: list[SearchRow] = []
    result = found(tmp_path, trials=3, say=lambda progress: said.append(progress.row))
    assert [row.name for row in said] == [row.name for row in result.rows]
