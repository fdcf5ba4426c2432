"""The leaderboards' suites from end to end, on made-up data in the datasets' schemas; scores by hand from items."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import leaderboard_data
import numpy as np
import pytest
from click.testing import CliRunner
from tiny_llama import make_tiny_llama

import eval.items
import eval.tasks
from eval.tasks import get_suite, resolve
from eval.tasks.leaderboards import BBH, MUSR
from merge.cli import cli
from merge.errors import MergeError

READ = "leaderboard_bbh,leaderboard_gpqa,leaderboard_musr,leaderboard_mmlu_pro"  # need no further packages


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_models(tmp_path_factory.mktemp("models"), context=288)  # long prompts are cut, which is fast


def make_models(root: Path, context: int) -> Path:
    """a and b, and a recipe that averages them."""
    import torch
    from transformers import AutoModelForCausalLM

    for name, seed in (("a", 1), ("b", 2)):
        make_tiny_llama(root / name, context=context)
        model = AutoModelForCausalLM.from_pretrained(root / name)
        torch.manual_seed(seed)
        for parameter in model.parameters():
            parameter.data += 0.1 * torch.randn_like(parameter)
        model.save_pretrained(root / name)
    (root / "mean.yaml").write_text(
        "merge_method: linear\nmodels: [{model: a}, {model: b}]\nparameters: {weight: 1}\n", encoding="utf-8"
    )
    return root


@pytest.fixture(scope="module")
def manager() -> Any:
    """lm-eval's index of the tasks that are used here; that of all its tasks takes many seconds."""
    import lm_eval.tasks

    folder = Path(lm_eval.tasks.__file__).parent
    names = ("arc", "hellaswag", "mmlu/default", "truthfulqa", "winogrande", "gsm8k", "leaderboard")
    return lm_eval.tasks.TaskManager(include_path=[folder / name for name in names], include_defaults=False)


@pytest.fixture
def evaluated(tmp_path: Path, models: Path, manager: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """evaluated(words of `merge eval`) -> the results file, read."""
    import datasets

    def load(path: str, name: str | None = None, **rest: Any) -> Any:
        return leaderboard_data.load_dataset(path, name, rows=2, **rest)

    monkeypatch.setattr(datasets, "load_dataset", load)
    for module in (eval.tasks, eval.items):
        monkeypatch.setattr(module, "task_manager", lambda include, defaults: manager)
    monkeypatch.setenv("MERGE_EVAL_CACHE", str(tmp_path / "answers.sqlite"))
    monkeypatch.chdir(models)

    def run(*words: object) -> dict[str, Any]:
        out = tmp_path / "results.json"
        asked = ["eval", "a", "mean.yaml", *map(str, words), "-o", str(out), "--quiet"]
        done = CliRunner().invoke(cli, asked, catch_exceptions=False)
        assert done.exit_code == 0, done.output
        found: dict[str, Any] = json.loads(out.read_text(encoding="utf-8")) | {"file": str(out), "said": done.stdout}
        return found

    return run


def of_items(task: Mapping[str, Any]) -> tuple[float, float]:
    """Mean and its standard error."""
    items = np.array(task["items"])
    return float(items.mean()), float(items.std(ddof=1) / math.sqrt(len(items)))


def check(column: Mapping[str, Any], raw: list[tuple[float, float]], chances: list[float]) -> None:
    """A leaderboard's score from the raw scores and errors of its parts."""
    values = [max(0.0, (value - b) / (1 - b)) for (value, _), b in zip(raw, chances, strict=True)]
    errors = [error / (1 - b) for (_, error), b in zip(raw, chances, strict=True)]
    metrics = column["metrics"]
    assert metrics["score,none"] == pytest.approx(sum(values) / len(values), abs=1e-12)
    assert metrics["score_stderr,none"] == pytest.approx(math.sqrt(sum(e * e for e in errors)) / len(errors), abs=1e-12)


def test_version_1(evaluated: Any) -> None:
    found = evaluated("--suite", "openllm-v1")
    assert found["tasks"] == ["ARC", "HellaSwag", "MMLU", "TruthfulQA", "Winogrande", "GSM8K"]
    assert len({model["tasks"]["MMLU"]["metrics"]["score,none"] for model in found["models"]}) > 1
    for model in found["models"]:
        tasks = model["tasks"]
        subjects = [name for name in tasks if name.startswith("mmlu_") and tasks[name]["items"]]
        assert len(subjects) == 57
        check(tasks["MMLU"], [of_items(tasks[name]) for name in subjects], [0.0] * 57)
        assert tasks["MMLU"]["n"] == sum(tasks[name]["n"] for name in subjects)
        for column, name in (("ARC", "arc_challenge"), ("HellaSwag", "hellaswag"), ("Winogrande", "winogrande")):
            check(tasks[column], [of_items(tasks[name])], [0.0])
        check(tasks["TruthfulQA"], [of_items(tasks["truthfulqa_mc2"])], [0.0])
        assert 0 < tasks["truthfulqa_mc2"]["items"][0] < 1
        assert tasks["gsm8k"]["metric"] == "exact_match,strict-match"
        check(tasks["GSM8K"], [of_items(tasks["gsm8k"])], [0.0])
    assert found["notes"] == []


def test_version_2(evaluated: Any) -> None:
    found = evaluated("--suite", "openllm-v2", "--tasks", READ)
    assert found["tasks"] == ["BBH", "GPQA", "MuSR", "MMLU-Pro"]
    for model in found["models"]:
        tasks = model["tasks"]
        bbh = {name: of_items(tasks[f"leaderboard_bbh_{name}"]) for name in BBH}
        check(tasks["BBH"], list(bbh.values()), [1 / n for n in BBH.values()])
        musr = [of_items(tasks[f"leaderboard_musr_{name}"]) for name in MUSR]
        check(tasks["MuSR"], musr, [1 / 2, 1 / 5, 1 / 3])
        check(tasks["MMLU-Pro"], [of_items(tasks["leaderboard_mmlu_pro"])], [1 / 10])
        # GPQA's three sets are one task: their items together, whose error pools the variances within the sets.
        parts = [tasks[f"leaderboard_gpqa_{name}"] for name in ("main", "extended", "diamond")]
        items = [item for part in parts for item in part["items"]]
        within = sum(np.var(part["items"]) * len(part["items"]) for part in parts)
        pooled = math.sqrt(within / (len(items) - 3) / len(items))
        check(tasks["GPQA"], [(float(np.mean(items)), pooled)], [1 / 4])
        assert tasks["leaderboard_gpqa"]["metrics"]["acc_norm,none"] == pytest.approx(np.mean(items))
    # GPQA's choices are shuffled while its data is read: in the same way for every model, and in another process.
    assert len({json.dumps(model["tasks"]["GPQA"]["n"]) for model in found["models"]}) == 1
    again = evaluated("--suite", "openllm-v2", "--tasks", READ)
    assert [model["asked"] for model in again["models"]] == [0, 0]
    assert [model["tasks"] for model in again["models"]] == [model["tasks"] for model in found["models"]]
    limited = evaluated("--suite", "openllm-v2", "--tasks", "leaderboard_musr", "--limit", 1)
    said = "MuSR: on a sample of 1 items a task; not a leaderboard score."
    assert limited["notes"] == [said]
    assert said in limited["said"]
    compared = CliRunner().invoke(cli, ["compare", limited["file"], "--json"], catch_exceptions=False)
    few = "No interval for MuSR: fewer than 6 items cannot show a difference at the 5 % level."
    assert json.loads(compared.stdout)["notes"] == [said, few]


def test_one_missing_dataset_is_named(evaluated: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    load = datasets.load_dataset

    def without(path: str, name: str | None = None, **rest: Any) -> Any:
        if path == "TAUR-Lab/MuSR":
            raise ConnectionError("Couldn't reach 'TAUR-Lab/MuSR' on the Hub (OfflineModeIsEnabled)")
        return load(path, name, **rest)

    monkeypatch.setattr(datasets, "load_dataset", without)
    with pytest.raises(MergeError) as caught:
        evaluated("--suite", "openllm-v2", "--tasks", READ)
    assert caught.value.exit_code == 1
    lines = str(caught.value).splitlines()
    assert lines[0].startswith("leaderboard_musr: the dataset TAUR-Lab/MuSR is neither cached nor reachable")
    assert lines[-1] == "The other tasks can be run without them: name them with --tasks, beside --suite."
    assert not any("leaderboard_bbh" in line for line in lines)


def test_tasks_of_a_suite_are_picked_with_its_settings(manager: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    (task,) = resolve(["arc_challenge"], "openllm-v1")
    assert (task.name, task.num_fewshot, task.score is not None) == ("arc_challenge", 25, True)
    assert [task.name for task in resolve(["gsm8k", "mmlu"], "openllm-v1")] == ["gsm8k", "mmlu"]
    monkeypatch.setattr(eval.tasks, "task_manager", lambda include, defaults: manager)
    names = [task.name for task in resolve(["arc_easy"], "openllm-v1")]  # not of the suite: added to it
    assert names == [*(task.name for task in get_suite("openllm-v1").tasks), "arc_easy"]


@pytest.mark.full
def test_tasks_that_need_further_packages(tmp_path: Path, evaluated: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """IFEval and MATH; skipped where lm-eval's extras are not installed."""
    for name in ("langdetect", "immutabledict", "pkg_resources", "math_verify", "antlr4"):
        pytest.importorskip(name)
    monkeypatch.chdir(make_models(tmp_path, context=2048))
    found = evaluated("--suite", "openllm-v2", "--tasks", "leaderboard_ifeval,leaderboard_math_hard")
    for model in found["models"]:
        tasks = model["tasks"]
        prompts = tasks["leaderboard_ifeval"]["items"]
        rights, asked = np.array(tasks["leaderboard_ifeval"]["also"]["inst_level_strict_acc,none"]).sum(axis=0)
        assert tasks["IFEval"]["metrics"] == {"score,none": pytest.approx((np.mean(prompts) + rights / asked) / 2)}
        parts = [task for name, task in tasks.items() if name.startswith("leaderboard_math_") and task["items"]]
        assert len(parts) == 7
        items = [item for part in parts for item in part["items"]]
        assert tasks["MATH Lvl 5"]["metrics"]["score,none"] == pytest.approx(np.mean(items))
