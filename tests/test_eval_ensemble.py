"""Ensembles: mixtures of probabilities, votes, and what their members answered before."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from lm_eval.api.instance import Instance

from eval.ensemble import EnsembleLM
from eval.harness import evaluate
from eval.memory import Memory
from eval.models import subjects
from eval.results import Results
from eval.settings import Settings
from eval.tasks import resolve
from eval.tasks.task import Task
from merge.cli import cli
from merge.errors import UsageError


class Member:
    """Fixed answers, in the order of requests."""

    asked = remembered = 0

    def __init__(self, kind: str, answers: list[Any]) -> None:
        setattr(self, kind, lambda requests: answers)

    def release(self) -> None:
        pass


def ensemble(kind: str, *answers: list[Any]) -> EnsembleLM:
    return EnsembleLM([Member(kind, each) for each in answers])  # type: ignore[misc]


def requests(count: int) -> list[Instance]:
    return [Instance("x", {}, ("q", "a"), 0) for _ in range(count)]


def test_choices_get_the_mean_of_probabilities() -> None:
    model = ensemble("loglikelihood", [(math.log(0.5), True)], [(math.log(0.1), False)], [(math.log(0.3), True)])
    ((value, greedy),) = model.loglikelihood(requests(1))
    assert (value, greedy) == (pytest.approx(math.log(0.3)), True)


def test_perplexity_gets_the_mean_of_the_probabilities_of_each_token() -> None:
    model = ensemble("token_log_probabilities", [[math.log(0.5), math.log(0.1)]], [[math.log(0.1), math.log(0.5)]])
    assert model.loglikelihood_rolling(requests(1)) == [pytest.approx(2 * math.log(0.3))]
    other = ensemble("token_log_probabilities", [[-1.0, -2.0]], [[-1.0]])
    with pytest.raises(UsageError, match="different tokens"):
        other.loglikelihood_rolling(requests(1))


def test_texts_are_voted_on_and_of_equals_the_first_named_wins() -> None:
    model = ensemble("generate_until", ["a", " b", "x"], ["b", "b ", "y"], ["b", "c", "z"])
    assert model.generate_until(requests(3)) == ["b", " b", "x"]


@pytest.fixture
def memory(tmp_path: Path) -> Iterator[Memory]:
    with Memory(tmp_path / "answers.sqlite") as found:
        yield found


@pytest.fixture
def models(tmp_path: Path, make_model: Callable[..., Path]) -> list[str]:
    made = []
    for seed, name in enumerate("ab"):
        path = make_model(tmp_path / name, seed=seed)
        config = json.loads((path / "tokenizer_config.json").read_text())
        (path / "tokenizer_config.json").write_text(json.dumps(config | {"eos_token": "<unk>"}))
        made.append(str(path))
    return made


@pytest.fixture
def tasks(tmp_path: Path) -> tuple[Task, ...]:
    rows = [{"question": f"w{i} w{i + 1}", "choices": ["w1 w2", f"w{i}"], "answer": i % 2} for i in range(1, 9)]
    (tmp_path / "choices.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    (tmp_path / "text.txt").write_text("w1 w2 w3 w4 w5\nw7 w3 w9 w9\n", encoding="utf-8")
    return (*resolve([str(tmp_path / "choices.jsonl")], None), *resolve([], None, None, tmp_path / "text.txt"))


def judge(models: list[str], members: list[str], tasks: tuple[Task, ...], memory: Memory) -> Results:
    return evaluate(subjects(models), tasks, Settings(), memory, ensembles=[subjects(members)])


def test_an_ensemble_is_one_more_row_and_asks_nothing_twice(
    models: list[str], tasks: tuple[Task, ...], memory: Memory
) -> None:
    found = judge(models, models, tasks, memory)
    a, b, both = found.models
    assert both.name == "ensemble of a, b"
    assert both.parents == ()
    text = found.tasks[1]
    n = both.tasks[text].n
    assert (both.asked, both.remembered) == (2 * n, a.asked + b.asked - 2 * n)  # the probability of every token is new
    again = judge(models, models, tasks, memory).models[2]
    assert (again.asked, again.tasks) == (0, both.tasks)
    mean = (a.tasks[text].value + b.tasks[text].value) / 2
    assert both.tasks[text].value < mean  # the logarithm is concave


def test_an_ensemble_of_a_model_with_itself_is_that_model(
    models: list[str], tasks: tuple[Task, ...], memory: Memory, tmp_path: Path
) -> None:
    import shutil

    shutil.copytree(models[0], tmp_path / "copy")
    found = judge(models[:1], [models[0], str(tmp_path / "copy")], tasks, memory)
    one, both = found.models
    for name in found.tasks:
        mine, theirs = (np.array(model.tasks[name].items, dtype=float) for model in (one, both))
        assert theirs == pytest.approx(mine, rel=1e-5)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--ensemble", "a"], "expected at least two models"),
        (["--path", "--ensemble", "a,b"], "cannot be combined with --path"),
    ],
)
def test_wrong_ensembles_are_refused_before_anything_is_loaded(arguments: list[str], message: str) -> None:
    result = CliRunner().invoke(cli, ["eval", "a", "b", *arguments])
    assert isinstance(result.exception, UsageError)
    assert message in str(result.exception)
