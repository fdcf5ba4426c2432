"""Several tasks: strategies, merges, scores, nothing done twice."""

from __future__ import annotations

import dataclasses
import gc
import json
import multiprocessing
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny_llama import make_tiny_llama, words, write_lines

from eval.exact_match import SKILLS, complete, questions
from finetune.config import load_config
from finetune.keys import DataSource
from finetune.prepare import prepare
from finetune.strategies import Result, load_tasks, run_strategies, stages
from finetune.strategies.config import mixture
from finetune.strategies.score import Scorer, StrategyScore
from finetune.strategies.table import as_json, forgetting, rows
from finetune.train import finetune
from merge.errors import MergeError, OutputError, UsageError
from merge.output.directory import take_lock

ROOT = Path(__file__).resolve().parent.parent
FAMILY = ROOT / "recipes" / "quickstart"
TASKS = """\
model: {model}
out: {out}
train: {train}
strategy: [{strategy}]
batch_size: 16
max_steps: 3
learning_rate: 1e-3
validation: 0.2
tasks:
  up: {{data: {data}/up.jsonl, max_steps: 2}}
  rev: {{data: {data}/rev.jsonl}}
"""
MERGE = """\
merge:
- {merge_method: task_arithmetic, parameters: {weight: 0.6}}
- {merge_method: linear, name: mean, parameters: {weight: 1}, tasks: {rev: {weight: 3}}}
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tasks")
    make_tiny_llama(folder / "model")
    write_lines(folder / "up.jsonl", words(40))
    reversed_words = [{"prompt": f"r:{row['prompt']}", "completion": row["prompt"][-2::-1]} for row in words(40, 1)]
    write_lines(folder / "rev.jsonl", reversed_words)
    gc.collect()
    gc.freeze()  # every run collects garbage, and looks through all of torch for it
    return folder


@pytest.fixture
def tasks(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """tasks("parallel", MERGE) -> a task file over two small data sets; no curves: they take longest."""
    monkeypatch.setattr("finetune.result.draw_losses", lambda log, path, unit: None)

    def write(strategy: str, more: str = "", train: str = "full") -> Path:
        text = TASKS.format(model=place / "model", data=place, out=tmp_path / "out", strategy=strategy, train=train)
        (tmp_path / "tasks.yaml").write_text(text + more, encoding="utf-8")
        return tmp_path / "tasks.yaml"

    return write


def run(file: Path, *, force: bool = False, workers: int = 1, **flags: Any) -> list[Result]:
    loaded = load_tasks(str(file), {name: [str(value)] for name, value in flags.items()})
    return run_strategies(dataclasses.replace(loaded, workers=workers), device="cpu", threads=1, force=force)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(next(folder.glob("*model.safetensors")))


def manifest(folder: Path) -> dict[str, Any]:
    read: dict[str, Any] = json.loads((folder / "finetune_manifest.json").read_text(encoding="utf-8"))
    return read


def no_training(*args: Any, **more: Any) -> Any:
    raise AssertionError("trained again")


def test_three_strategies_and_merges_in_one_table(
    tasks: Callable[..., Path], place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tasks("simultaneous, sequential, parallel", MERGE)
    results = run(file)
    out = tmp_path / "out"
    assert [result.name for result in results] == [
        *("base", "simultaneous", "sequential 1 up", "sequential 2 rev", "parallel up", "parallel rev"),
        *("merged task_arithmetic", "merged mean"),
    ]
    scores = {result.name: result.scores for result in results}
    for name in ("simultaneous", "sequential 2 rev", "merged mean"):
        assert all(scores[name][task].loss < scores["base"][task].loss for task in ("up", "rev"))
    # The first stage of a sequence is the expert; the second goes on from it.
    first, second, expert = (weights(out / name) for name in ("sequential/1-up", "sequential/2-rev", "parallel/up"))
    assert all(torch.equal(first[name], expert[name]) for name in first)
    assert manifest(out / "sequential/2-rev")["config"]["model"] == str(out / "sequential/1-up")
    assert not all(torch.equal(first[name], second[name]) for name in first)
    assert (manifest(out / "parallel/up")["steps"], manifest(out / "parallel/rev")["steps"]) == (2, 3)
    # The merge is that of the recipe: weights 1 and 3 of 4.
    name = "model.layers.0.mlp.up_proj.weight"
    parts = [weights(out / "parallel" / task)[name].double() for task in ("up", "rev")]
    mean = (parts[0] + 3 * parts[1]) / 4
    assert torch.equal(weights(out / "merged/mean")[name], mean.bfloat16())
    kept = json.loads((out / "results.json").read_text(encoding="utf-8"))
    assert kept == json.loads(json.dumps(as_json(["up", "rev"], results)))
    assert kept["forgetting"]["up"]["loss"] == pytest.approx(
        scores["sequential 2 rev"]["up"].loss - scores["sequential 1 up"]["up"].loss
    )

    # Again: nothing is trained, the figures are the same.
    with monkeypatch.context() as patched:
        patched.setattr(stages, "finetune", no_training)
        assert run(file) == results

    # Another rate for one task: said, then trained again with --force, with what was made from it.
    file.write_text(file.read_text().replace("max_steps: 2}", "max_steps: 2, learning_rate: 2e-3}"))
    with pytest.raises(UsageError, match=r"1-up holds a training that differs in: learning_rate\. Use --force"):
        run(file)
    before = {path: path.stat().st_ctime_ns for path in out.glob("*/*/config.json")}  # inodes are used again
    again = run(file, force=True)
    changed = {path.parent.relative_to(out).as_posix() for path in before if path.stat().st_ctime_ns != before[path]}
    assert changed == {"sequential/1-up", "sequential/2-rev", "parallel/up", "merged/task_arithmetic", "merged/mean"}
    assert again[1] == results[1]


def test_adapters_go_on_in_sequence_and_are_scored_with_their_base(tasks: Callable[..., Path], tmp_path: Path) -> None:
    results = run(tasks("sequential", train="lora"), learning_rate="2e-2")
    first, second = (weights(tmp_path / "out/sequential" / name) for name in ("1-up", "2-rev"))
    assert first.keys() == second.keys()
    assert any(name.endswith("lora_B.weight") and bool(value.any()) for name, value in first.items())
    # The second starts from the first, not from nothing: three small steps leave A near to it.
    a = next(name for name in first if name.endswith("lora_A.weight"))
    assert torch.nn.functional.cosine_similarity(first[a].flatten(), second[a].flatten(), 0) > 0.8
    base, one, two = (result.scores for result in results)
    assert one["up"].loss < base["up"].loss
    assert two["rev"].loss < one["rev"].loss


def test_a_process_of_its_own_gives_the_same_bits(tasks: Callable[..., Path], tmp_path: Path) -> None:
    loaded = load_tasks(str(tasks("parallel")))
    here, there = (dataclasses.replace(loaded.tasks[0].config, out=str(tmp_path / name)) for name in ("here", "there"))
    said: list[str] = []
    machine = stages.Machine("cpu", 1, False, said.append, no_training)
    stages._train_in_processes([stages.TrainingStage("up", prepare(there), loaded.folder)], 2, machine)
    assert [line.split(",")[0] for line in said] == ["up: started", "up: 2 steps"]
    finetune(prepare(here), device="cpu", threads=1)
    before, after = weights(tmp_path / "here"), weights(tmp_path / "there")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.full  # each process imports torch, transformers and peft
def test_processes_give_the_same_bits(tasks: Callable[..., Path], tmp_path: Path) -> None:
    file = tasks("parallel")
    alone = run(file)
    kept = {task: weights(tmp_path / "out/parallel" / task) for task in ("up", "rev")}
    apart = run(file, workers=2, out=tmp_path / "apart")
    for task, before in kept.items():
        after = weights(tmp_path / "apart/parallel" / task)
        assert all(torch.equal(before[name], after[name]) for name in before)
    assert [result.scores for result in apart] == [result.scores for result in alone]


def test_what_fails_in_a_process_is_said(tasks: Callable[..., Path], tmp_path: Path) -> None:
    loaded = load_tasks(str(tasks("parallel")))
    config = dataclasses.replace(loaded.tasks[0].config, out=str(tmp_path / "up"))
    (tmp_path / "up.partial").mkdir()
    (tmp_path / "up.partial" / "mine").touch()
    here, there = multiprocessing.Pipe(duplex=False)
    stages._work(config, loaded.folder, "cpu", 1, False, (), there)
    ended = SimpleNamespace(join=lambda: None, exitcode=0)
    ((name, text, code),) = stages._outcome("parallel: up", ended, here, no_training)
    assert (name, code) == ("parallel: up", 2)
    assert "up.partial exists and is not unfinished work of merge finetune" in text
    there.close()  # as when the system kills a process that takes too much memory
    ended.exitcode = -9
    assert stages._outcome("parallel: up", ended, here, no_training) == [
        ("parallel: up", "its process ended with exit code -9; out of memory?", 1)
    ]


def test_exact_match_is_that_of_greedy_decoding(tmp_path: Path) -> None:
    import random

    from transformers import AutoModelForCausalLM, AutoTokenizer

    skill = SKILLS["sort"]
    asked = questions(skill, 60, random.Random(5), test=True)
    pairs = [{"prompt": skill.prompt(question), "completion": skill.solve(question)} for question in asked]
    held = write_lines(tmp_path / "held.jsonl", pairs)
    flags = {"model": [str(FAMILY / "base")], "data": [str(held)], "validation": [str(held)], "out": ["x"]}
    scorer = Scorer({"sort": prepare(load_config(None, flags))}, None, "cpu")
    model = AutoModelForCausalLM.from_pretrained(FAMILY / "base", dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(FAMILY / "base")
    written = complete(model, tokenizer, [row["prompt"] for row in pairs])
    right = sum(row["completion"] == text for row, text in zip(pairs, written, strict=True))
    assert 10 < right < 50
    assert scorer.score(None)["sort"].exact == right / 60
    assert scorer.score(FAMILY / "sort")["sort"].exact == pytest.approx(1, abs=0.1)


def test_the_table_and_what_was_forgotten() -> None:
    def result(strategy: str, stage: str, a: float, b: float) -> Result:
        return Result(strategy, stage, "", {"a": StrategyScore(1 - a, a, 100), "b": StrategyScore(1 - b, b, 100)})

    results = [result("base", "", 0, 0), result("sequential", "1 a", 0.9, 0.2), result("sequential", "2 b", 0.3, 0.8)]
    lost = forgetting(["a", "b"], results)
    assert lost is not None
    assert lost == {"a": {"loss": pytest.approx(0.6), "exact": pytest.approx(0.6)}}
    assert forgetting(["a", "b"], results[:1]) is None
    assert [row[1] for row in rows(["a", "b"], results)] == [
        *("a", "1.000     0.0%", "0.100    90.0%", "0.700    30.0%", "+0.600   -60.0%"),
    ]


def test_the_mixture_has_tasks_weights_and_templates(tmp_path: Path) -> None:
    file = tmp_path / "t.yaml"
    file.write_text(
        "model: m\nout: o\nstrategy: simultaneous\nmax_steps: 9\ntasks:\n"
        "  a: {data: a.csv, prompt: '{q}', completion: '{a}', validation: ah.csv, weight: 1, max_steps: 2}\n"
        "  b:\n    weight: 3\n    validation: bh.jsonl\n"
        "    data: [{path: b.jsonl, weight: 3}, {path: c.jsonl, weight: 1, format: text}]\n"
    )
    config = mixture(load_tasks(str(file)))
    assert config.max_steps == 9
    assert config.data == (
        DataSource("a.csv", prompt="{q}", completion="{a}", weight=1.0, task="a"),
        DataSource("b.jsonl", weight=2.25, task="b"),
        DataSource("c.jsonl", weight=0.75, format="text", task="b"),
    )
    assert config.validation == (
        DataSource("ah.csv", prompt="{q}", completion="{a}", task="a"),
        DataSource("bh.jsonl", task="b"),
    )


@pytest.mark.parametrize(
    ("train", "keys", "merge", "message"),
    [
        ("lora", {}, "ties, align: permutation, parameters: {weight: 1}", "found no layer whose units can be permuted"),
        ("lora", {"dora": "true"}, "ties, fold: false, parameters: {weight: 1}", "a is a DoRA adapter"),
        ("lora", {"new_tokens": "@"}, "cat, fold: false", "a replaces rows of .*, which is not a change"),
        ("full", {"new_tokens": "@"}, "ties, parameters: {weight: 1}", "Set tokenizer_source: union"),
        ("full", {}, "linear, parameters: {weight: 1}, tokenizer_source: nowhere", "no such directory"),
    ],
)
def test_a_merge_that_does_not_fit_the_model_is_said_before_training(
    tasks: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
    train: str,
    keys: dict[str, str],
    merge: str,
    message: str,
) -> None:
    monkeypatch.setattr(stages, "finetune", no_training)
    text = tasks("parallel", f"merge: {{merge_method: {merge}}}\n", train).read_text()
    file = tasks("parallel")
    file.write_text(text.replace("  up:", "  a:").replace("  rev:", "  b:"))
    with pytest.raises(MergeError, match=message):
        run(file, **keys)
    assert not (file.parent / "out").exists()


def test_new_tokens_go_through_all_strategies(tasks: Callable[..., Path], tmp_path: Path) -> None:
    merge = "merge: {merge_method: task_arithmetic, tokenizer_source: union, parameters: {weight: 0.5}}\n"
    results = run(tasks("sequential, parallel", merge), new_tokens="@")
    assert [result.name for result in results][-1] == "merged task_arithmetic"
    assert all(weights(Path(result.path))["lm_head.weight"].shape[0] == 80 for result in results[1:])


def test_one_run_at_a_time(tasks: Callable[..., Path], tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    lock = take_lock(tmp_path / "out")
    with pytest.raises(OutputError, match="out is being written by another run"):
        run(tasks("parallel"))
    lock.release()


def test_a_directory_of_something_else_is_left_alone(tasks: Callable[..., Path], tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").touch()
    with pytest.raises(UsageError, match="out exists and is not unfinished work of merge finetune with tasks"):
        run(tasks("parallel"))
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["mine"]
