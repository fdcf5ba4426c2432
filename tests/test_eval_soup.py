"""Soups and paths between models: what is judged is what is written, on one side of the holdout."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import judging
import pytest
import verdicts as made
from adapter_files import make_adapter
from click.testing import CliRunner
from judging import Run, judged, replace_weights

from eval.compare import parents as judged_parents
from eval.harness import evaluate
from eval.memory import Memory
from eval.models import subjects
from eval.path import judge_path
from eval.results import Results
from eval.settings import Settings
from eval.soup import Soup, greedy_soup
from eval.tasks import resolve
from merge import build_plan, load_recipe, run_plan
from merge.cli import cli
from merge.errors import SourceChanged, UsageError

memory, tiny, choices = judging.memory, judging.tiny, judging.choices  # fixtures

ROOT = Path(__file__).resolve().parent.parent
FAMILY = ROOT / "recipes" / "quickstart"


def test_sides_of_the_holdout_share_no_item_and_make_up_the_whole(memory: Memory) -> None:
    tasks = resolve([], "quickstart")[:1]
    ids = []
    for held_out in (True, False):
        settings = Settings(limit=11, holdout=0.4, held_out=held_out)
        ids.append(judged([FAMILY / "base"], tasks, memory, settings).models[0].tasks["reverse"].doc_ids)
    assert [len(side) for side in ids] == [4, 7]
    whole = judged([FAMILY / "base"], tasks, memory, Settings(limit=11)).models[0]
    assert sorted(ids[0] + ids[1]) == list(whole.tasks["reverse"].doc_ids)
    assert whole.asked == 0


def test_a_soup_takes_models_as_long_as_it_does_not_get_worse(memory: Memory) -> None:
    tasks = resolve([], "quickstart")
    models = [str(FAMILY / name) for name in ("reverse", "sort", "add")]

    def judge(judged: Any, settings: Settings) -> Results:
        return evaluate(judged, tasks, settings, memory)

    soup = greedy_soup(models, judge, Settings(limit=40), 0.5)
    first, *later = soup.steps
    singles = [sum(task.value for task in model.tasks.values()) / 3 for model in soup.singles.models]
    assert first.score == pytest.approx(max(singles))
    best = first.score
    for step in later:
        assert step.kept == (step.score >= best)
        best = max(best, step.score)
    assert len(soup.members) == sum(step.kept for step in soup.steps) >= 2
    assert soup.recipe.count("- model:") == len(soup.members)
    chosen = soup.singles.models[0].tasks["sort"].doc_ids
    reported = soup.report.models[0].tasks["sort"].doc_ids
    assert not set(chosen) & set(reported)
    assert [model.name for model in soup.report.models] == ["reverse", "sort", "add", "soup"]


def test_a_path_has_its_ends_and_nine_points_between(tmp_path: Path, tiny: Run, choices: Path, memory: Memory) -> None:
    tiny(tmp_path / "a")
    tiny(tmp_path / "b", base=tmp_path / "a", delta=0.02, seed=1)
    tasks = resolve([str(choices)], None)
    ends = [str(tmp_path / name) for name in "ab"]
    found = judge_path(ends, lambda judged, settings: evaluate(judged, tasks, settings, memory), Settings(limit=3))
    assert found.path == (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
    assert [model.name for model in found.models][::5] == ["a", "t = 0.5", "b"]
    assert len({model.digest for model in found.models}) == 11
    with pytest.raises(UsageError, match="--path: expected two models, found 1"):
        judge_path(ends[:1], lambda judged, settings: found, Settings())


@pytest.fixture
def parents(tmp_path: Path, tiny: Run, monkeypatch: pytest.MonkeyPatch) -> Path:
    """a and b, an adapter of a, recipes; and what they make, in made/."""
    monkeypatch.chdir(tmp_path)
    tiny(tmp_path / "a")
    tiny(tmp_path / "b", base=tmp_path / "a", delta=0.2, seed=1)
    make_adapter(tmp_path / "lora", tmp_path / "a", noise=0.3)
    (tmp_path / "mean.yaml").write_text(
        "merge_method: linear\nmodels: [{model: a}, {model: b}]\nparameters: {weight: 1}\n"
    )
    (tmp_path / "a+lora.yaml").write_text("merge_method: passthrough\nmodels: [{model: a+lora}]\n")
    for name in ("mean", "a+lora"):
        run_plan(build_plan(load_recipe(tmp_path / f"{name}.yaml")), tmp_path / "made" / name)
    return tmp_path


@pytest.mark.filterwarnings("ignore")  # what transformers and peft warn of is not ours
def test_parents_are_known_by_their_places(parents: Path) -> None:
    """However they are written: an adapter and its base, a recipe of both, and its output."""
    (parents / "both.yaml").write_text(
        "merge_method: linear\nmodels: [{model: ./a+lora}, {model: b}]\nparameters: {weight: 1}\n"
    )
    run_plan(build_plan(load_recipe(parents / "both.yaml")), parents / "made" / "both")
    found = [
        dataclasses.replace(made.model(str(place), [made.task("t", [1.0])], subject.parents), path=subject.place)
        for place, subject in enumerate(subjects(["a", "a+lora", "b", "both.yaml", str(parents / "made" / "both")]))
    ]
    results = made.results(found)
    assert [[one.name for one in judged_parents(results, model)] for model in found] == [
        [],
        ["0"],
        [],
        ["1", "2"],
        ["1", "2"],
    ]


@pytest.mark.filterwarnings("ignore")  # what transformers and peft warn of is not ours
def test_a_path_between_a_recipe_and_an_adapter(parents: Path, memory: Memory) -> None:
    (parents / "text.txt").write_text("w1 w2 w3\nw4 w5\nw6 w7 w8\n")
    tasks = resolve([], None, data=parents / "text.txt")

    def along(*ends: str) -> Results:
        return judge_path(ends, lambda judged, settings: evaluate(judged, tasks, settings, memory), Settings())

    found, expected = along("mean.yaml", "a+lora"), along("made/mean", "made/a+lora")
    assert [model.tasks for model in found.models] == [model.tasks for model in expected.models]
    assert len({model.tasks["text"].value for model in found.models}) == 11
    assert {model.asked for model in expected.models} == {0}  # the same weights, whatever they were called


@pytest.mark.filterwarnings("ignore")  # what transformers and peft warn of is not ours
def test_a_soup_of_a_recipe_an_adapter_and_a_model(parents: Path, memory: Memory) -> None:
    (parents / "text.txt").write_text("w1 w2 w3\nw4 w5\nw6 w7 w8\nw9 w10\n")
    tasks = resolve([], None, data=parents / "text.txt")

    def soup(*models: str, keep: Path | None = None) -> Soup:
        return greedy_soup(
            models, lambda judged, settings: evaluate(judged, tasks, settings, memory), Settings(), 0.5, keep=keep
        )

    found, expected = soup("mean.yaml", "a+lora", "b"), soup("made/mean", "made/a+lora", "b")
    assert [(step.score, step.kept) for step in found.steps] == [(step.score, step.kept) for step in expected.steps]
    assert [model.tasks for model in found.report.models] == [model.tasks for model in expected.report.models]
    assert {"mean.yaml", "a+lora"} & set(found.members)
    kept = soup("mean.yaml", "a+lora", "b", keep=parents / "kept")
    if "mean.yaml" in found.members:
        assert "# First: merge run mean.yaml -o merged/mean\n" in found.recipe
        assert str(parents / "kept" / "mean") in kept.recipe
    run_plan(kept.plan(), parents / "soup")
    with Memory(parents / "new.sqlite") as new:
        (model,) = judged([parents / "soup"], tasks, new, Settings(holdout=0.5)).models
    assert model.tasks == found.report.models[-1].tasks


def test_a_soup_is_made_of_the_weights_that_were_judged(
    tmp_path: Path, tiny: Run, choices: Path, memory: Memory
) -> None:
    tasks = resolve([str(choices)], None)
    models = [str(tiny(tmp_path / name, seed=seed)) for seed, name in enumerate("ab")]

    def judge(found: Any, settings: Settings) -> Results:
        return evaluate(found, tasks, settings, memory)

    soup = greedy_soup(models, judge, Settings(), 0.5)
    assert len(soup.plan().models) == len(soup.members)
    replace_weights(Path(soup.members[0]), tiny(tmp_path / "c", seed=5))
    with pytest.raises(SourceChanged, match=r"model.safetensors: changed since the models were judged"):
        soup.plan()


@pytest.mark.filterwarnings("ignore")  # what transformers and peft warn of is not ours
def test_a_soup_that_is_written_names_what_it_is_made_of(parents: Path, choices: Path) -> None:
    with pytest.raises(UsageError, match=r"--out: .* mean.yaml is merged on the fly. .* --keep DIR"):
        CliRunner().invoke(
            cli, ["soup", "mean.yaml", "b", "--tasks", str(choices), "-o", "out"], catch_exceptions=False
        )
