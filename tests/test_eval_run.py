"""Evaluations: answers are asked once, by weights; recipes are judged as what they write; bad input is named."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import verdicts as made
from click.testing import CliRunner
from lm_eval.tasks import TaskManager
from test_adapters import make_adapter

import eval.items
from eval.compare import compare
from eval.compare import parents as judged_parents
from eval.difference import difference
from eval.harness import evaluate
from eval.html import page
from eval.memory import Memory, key_of
from eval.models import subjects
from eval.path import judge_path
from eval.results import Results
from eval.results_file import load_results
from eval.sandbox import guard
from eval.settings import Settings
from eval.soup import Soup, greedy_soup
from eval.tables import as_data, as_markdown
from eval.tasks import resolve
from eval.tasks.task import Task
from merge import build_plan, load_recipe, run_plan, verify_output
from merge.cli import cli
from merge.cli.judging import write_text
from merge.errors import MergeError, NumbersError, OutputError, SourceChanged, UsageError, is_kept
from merge.output.scratch import scratch

ROOT = Path(__file__).resolve().parent.parent
FAMILY = ROOT / "recipes" / "quickstart"
SOME = Settings(limit=6)
Run = Callable[..., Any]


@pytest.fixture
def memory(tmp_path: Path) -> Iterator[Memory]:
    with Memory(tmp_path / "answers.sqlite") as found:
        yield found


@pytest.fixture
def tiny(make_model: Run) -> Run:
    """make_model with an end token, which lm-eval needs."""

    def make(path: Path, **asked: Any) -> Path:
        made: Path = make_model(path, **asked)
        config = json.loads((made / "tokenizer_config.json").read_text())
        (made / "tokenizer_config.json").write_text(json.dumps(config | {"eos_token": "<unk>"}))
        return made

    return make


@pytest.fixture
def choices(tmp_path: Path) -> Path:
    """Eight questions with choices, in the words of make_model's tokenizer."""
    rows = [{"question": f"w{i} w{i + 1}", "choices": ["w1 w2", f"w{i}"], "answer": i % 2} for i in range(1, 9)]
    path = tmp_path / "choices.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def judged(models: list[str | Path], tasks: tuple[Task, ...], memory: Memory, settings: Settings = SOME) -> Results:
    return evaluate(subjects([str(model) for model in models]), tasks, settings, memory)


def test_a_recipe_is_judged_as_what_it_writes(tmp_path: Path, memory: Memory) -> None:
    tasks = resolve([], "quickstart")[:1]
    run_plan(build_plan(load_recipe(FAMILY.with_suffix(".yaml"))), tmp_path / "out")
    on_the_fly = judged([FAMILY.with_suffix(".yaml")], tasks, memory).models[0]
    with Memory(tmp_path / "other.sqlite") as other:
        from_disk = judged([tmp_path / "out"], tasks, other).models[0]
    assert (on_the_fly.asked, from_disk.asked) == (6, 6)
    assert on_the_fly.digest == from_disk.digest
    assert on_the_fly.tasks == from_disk.tasks
    assert {Path(parent).name for parent in on_the_fly.parents} == {Path(parent).name for parent in from_disk.parents}
    assert len(from_disk.parents) == 4
    again = judged([FAMILY.with_suffix(".yaml")], tasks, memory).models[0]
    assert (again.asked, again.remembered, again.tasks) == (0, 6, on_the_fly.tasks)


def test_answers_go_by_weights_and_not_by_path(tmp_path: Path, tiny: Run, choices: Path, memory: Memory) -> None:
    tasks = resolve([str(choices)], None)
    tiny(tmp_path / "a")
    tiny(tmp_path / "copy")
    first, copy = judged([tmp_path / "a", tmp_path / "copy"], tasks, memory).models
    assert (first.asked, copy.asked, copy.remembered) == (12, 0, 12)
    assert first.tasks == copy.tasks
    tiny(tmp_path / "a", seed=5)  # another model in the same place
    assert judged([tmp_path / "a"], tasks, memory).models[0].asked == 12
    assert judged([tmp_path / "a"], tasks, memory, dataclasses.replace(SOME, dtype="bfloat16")).models[0].asked == 12


def replace_weights(model: Path, other: Path) -> None:
    """The other model's weights in the model's place, with the size and mtime of the file that was there."""
    old, new = model / "model.safetensors", other / "model.safetensors"
    before = old.stat()
    os.utime(new, ns=(before.st_atime_ns, before.st_mtime_ns))
    os.replace(new, old)
    assert (old.stat().st_size, old.stat().st_mtime_ns) == (before.st_size, before.st_mtime_ns)


def test_other_weights_with_the_size_and_mtime_of_the_old_ones_are_asked_again(
    tmp_path: Path, tiny: Run, choices: Path, memory: Memory
) -> None:
    tasks = resolve([str(choices)], None)
    tiny(tmp_path / "a")
    recipe = tmp_path / "r.yaml"
    recipe.write_text(f"merge_method: passthrough\nmodels: [{{model: {tmp_path / 'a'}}}]\n")
    before = judged([tmp_path / "a", recipe], tasks, memory).models
    replace_weights(tmp_path / "a", tiny(tmp_path / "other", seed=5))
    after = judged([tmp_path / "a", recipe], tasks, memory).models
    assert after[0].asked == 12
    assert (after[0].digest == before[0].digest, after[1].digest == before[1].digest) == (False, False)


def test_weights_that_change_during_an_evaluation(tmp_path: Path, tiny: Run, choices: Path, memory: Memory) -> None:
    tasks = resolve([str(choices)], None)
    other = tiny(tmp_path / "other", seed=5)
    before = judged([other], tasks, memory).models[0]
    tiny(tmp_path / "a")

    def change(model: str, task: str, done: int, total: int) -> None:
        if done == 4:
            replace_weights(tmp_path / "a", other)

    with pytest.raises(SourceChanged, match=r"a/model.safetensors: changed while the model was evaluated"):
        evaluate(subjects([str(tmp_path / "a")]), tasks, Settings(batch_size=1), memory, progress=change)
    after = judged([tmp_path / "a"], tasks, memory).models[0]
    assert (after.digest, after.remembered, after.tasks) == (before.digest, 12, before.tasks)


def test_an_evaluation_that_was_stopped_asks_only_the_rest(
    tmp_path: Path, tiny: Run, choices: Path, memory: Memory
) -> None:
    class Stop(BaseException):
        pass

    def stop(model: str, task: str, done: int, total: int) -> None:
        if done >= 9:
            raise Stop

    tasks = resolve([str(choices)], None)
    tiny(tmp_path / "a")
    settings = Settings(batch_size=1)
    with pytest.raises(Stop):
        evaluate(subjects([str(tmp_path / "a")]), tasks, settings, memory, progress=stop)
    rest = judged([tmp_path / "a"], tasks, memory, settings).models[0]
    assert (rest.asked, rest.remembered) == (7, 9)
    with Memory(tmp_path / "fresh.sqlite") as fresh:
        assert judged([tmp_path / "a"], tasks, fresh, settings).models[0].tasks == rest.tasks


WRITER = """
import sys
from eval.memory import Memory, key_of
with Memory(sys.argv[1]) as memory:
    print("ready", flush=True)
    sys.stdin.readline()
    for number in range(400):
        memory.store(key_of(number), [number, True])
        assert memory.answers([key_of(number), key_of("none")]) == {key_of(number): [number, True]}
"""


def test_processes_that_write_at_once_lose_nothing(tmp_path: Path, memory: Memory) -> None:
    started = [
        subprocess.Popen(
            [sys.executable, "-c", WRITER, str(memory.path)],
            **dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE),
            cwd=ROOT,
            text=True,
        )
        for _ in range(3)
    ]
    for process in started:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
    for process in started:
        assert process.stdin is not None
        process.stdin.write("go\n")
        process.stdin.flush()
    assert [(process.communicate(timeout=100)[1], process.returncode) for process in started] == [("", 0)] * 3
    keys = {key_of(number): [number, True] for number in range(400)}
    assert memory.answers(keys) == keys


@pytest.mark.full
def test_two_evaluations_at_once_share_a_cache(tmp_path: Path, tiny: Run, choices: Path) -> None:
    tiny(tmp_path / "a")
    command = [sys.executable, "-m", "merge", "eval", str(tmp_path / "a"), "--tasks", str(choices), "--json", "--quiet"]
    command += ["--cache", str(tmp_path / "shared.sqlite"), "--batch-size", "1"]
    running = [subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    outputs = [process.communicate(timeout=200) for process in running]
    assert [process.returncode for process in running] == [0, 0], outputs
    one, two = (json.loads(out)["models"][0]["tasks"] for out, _ in outputs)
    assert one == two
    with Memory(tmp_path / "shared.sqlite") as memory:
        found = judged([tmp_path / "a"], resolve([str(choices)], None), memory, Settings(batch_size=1)).models[0]
    assert (found.asked, found.remembered) == (0, 16)


def test_a_model_that_gives_nan_is_refused_and_not_remembered(
    tmp_path: Path, tiny: Run, choices: Path, memory: Memory
) -> None:
    bad = np.full((16,), np.nan, dtype=np.float32)
    tiny(tmp_path / "a", extra={"model.norm.weight": bad})
    tasks = resolve([str(choices)], None)
    for _ in range(2):
        with pytest.raises(NumbersError, match=r"choices: the model gives NaN for 'w\d w\d"):
            judged([tmp_path / "a"], tasks, memory)


def test_nan_is_seen_in_what_a_model_writes_too(tmp_path: Path, tiny: Run, memory: Memory) -> None:
    tiny(tmp_path / "a", extra={"model.norm.weight": np.full((16,), np.nan, dtype=np.float32)})
    rows = [{"question": f"w{i}", "answer": "w3"} for i in range(3)]
    (tmp_path / "write.jsonl").write_text("\ufeff" + "".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    write = resolve([str(tmp_path / "write.jsonl")], None)
    with pytest.raises(NumbersError, match=r"write: the model gives NaN\. Its weights"):
        judged([tmp_path / "a"], write, memory, Settings(model_args={"max_length": 96}))


def test_a_group_of_ones_own_and_its_tasks(
    tmp_path: Path, tiny: Run, memory: Memory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Named beside their group, the tasks are still what its score is made of."""
    folder = tmp_path / "own"
    folder.mkdir()
    for name, n in (("one", 3), ("two", 5)):
        rows = [{"question": f"w{i}", "choices": ["w1", f"w{i + 2}"], "answer": i % 2} for i in range(n)]
        (tmp_path / f"{name}.json").write_text("\n".join(map(json.dumps, rows)))
        (folder / f"{name}.yaml").write_text(
            f"task: {name}\ndataset_path: json\ndataset_kwargs: {{data_files: {{test: {tmp_path}/{name}.json}}}}\n"
            "test_split: test\noutput_type: multiple_choice\ndoc_to_text: question\ndoc_to_choice: choices\n"
            "doc_to_target: answer\nmetric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]\n"
        )
    (folder / "both.yaml").write_text(
        "group: both\ntask: [one, two]\naggregate_metric_list: [{metric: acc, weight_by_size: true}]\n"
    )
    manager = TaskManager(include_path=str(folder), include_defaults=False)
    monkeypatch.setattr(eval.items, "task_manager", lambda include, defaults: manager)
    for name, seed in (("a", 0), ("b", 7)):
        tiny(tmp_path / name, seed=seed)
    found = judged([tmp_path / "a", tmp_path / "b"], resolve([], None, folder), memory, Settings(include=folder))
    assert set(found.tasks) == {"both", "one", "two"}
    for model in found.models:
        items = model.tasks["one"].items + model.tasks["two"].items
        assert model.tasks["both"].value == pytest.approx(np.mean(items))
    gain = difference(*found.models, "both")
    assert (gain.n, gain.why) == (8, "")
    with pytest.raises(UsageError, match=r"both.yaml: is a group of tasks\. Give .* --include"):
        resolve([str(folder / "both.yaml")], None)


def test_a_model_that_lm_eval_cannot_run_is_one_message(
    tmp_path: Path, make_model: Run, choices: Path, memory: Memory
) -> None:
    make_model(tmp_path / "a")  # its tokenizer has no end token
    with pytest.raises(MergeError, match="a on choices: lm-eval stopped with TypeError: "):
        judged([tmp_path / "a"], resolve([str(choices)], None), memory)


def test_results_say_what_code_was_run_under(
    tmp_path: Path, tiny: Run, memory: Memory, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("eval.tasks.core.code._MAX_TOKENS", 4)
    tasks = resolve(["core_code"], "core")
    found = judged([tiny(tmp_path / "model")], tasks, memory, Settings(limit=2, unsafe_code=True))
    (tmp_path / "r.json").write_text(found.to_json(), encoding="utf-8")
    for results in (found, load_results(tmp_path / "r.json")):
        assert results.models[0].tasks["core_code"].guard == guard()
        (note,) = results.notes
        assert note == f"core_code: the code that models wrote was run under {', '.join(guard())}."
        comparison = compare(results)
        assert note in as_markdown(comparison).replace("\\", "")
        assert note in page(comparison)
        assert as_data(comparison)["notes"] == [note]


def test_broken_lines_are_named(tmp_path: Path) -> None:
    path = tmp_path / "q.jsonl"
    lines = [
        '{"question": "a", "choices": ["x", "y"], "answer": 1}',
        '{"question": "a", "choices": ["x", "y"], "answer": 2}',
        "",
        '{"question": "a", "choices": ["x", "y"], "answer": "z"',
        '{"question": "a", "choices": ["x"], "answer": 0}',
        '{"question": "", "answer": "z"}',
        '{"question": "a", "anwser": "z"}',
        "[]",
    ]
    path.write_text("\n".join(lines), encoding="utf-8")
    with pytest.raises(UsageError) as caught:
        resolve([str(path)], None)
    said = str(caught.value).replace(f"{path}:", "").splitlines()
    assert [line.partition(":")[0] for line in said] == ["2", "4", "5", "6", "7", "8"]
    assert said[0] == '2: "answer": expected one of the choices or its number from 0, found 2.'
    assert said[1].startswith("4: is not valid JSON (")
    assert said[4] == '7: unknown key "anwser"; known: question, choices, answer.'


def test_unknown_names_have_suggestions(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r'unknown task "arc_esay"; did you mean "arc_easy"'):
        resolve(["arc_esay"], None)
    with pytest.raises(UsageError, match=r'unknown suite "quikstart"; did you mean "quickstart"\?'):
        resolve([], "quikstart")
    with pytest.raises(UsageError, match="there is no such task file"):
        resolve([str(tmp_path / "none.jsonl")], None)
    (tmp_path / "empty.txt").write_text("\n")
    with pytest.raises(UsageError, match=r"--data .*: holds no text"):
        resolve([], None, data=tmp_path / "empty.txt")
    with pytest.raises(UsageError, match="nothing to evaluate"):
        resolve([], None)


def test_a_task_without_its_data_says_what_to_fetch(tmp_path: Path, tiny: Run, memory: Memory) -> None:
    tiny(tmp_path / "a")
    with pytest.raises(
        MergeError, match=r"(?s)arc_easy: its dataset is neither cached nor reachable.*--tasks arc_easy"
    ):
        judged([tmp_path / "a"], resolve(["arc_easy"], None), memory)


def test_loss_on_a_text_is_bits_of_its_bytes(tmp_path: Path, tiny: Run, memory: Memory) -> None:
    """A model whose head is zero finds every token equally likely: log2(32) bits for each."""
    head = np.zeros((32, 16), dtype=np.float32)
    tiny(tmp_path / "a", extra={"lm_head.weight": head})
    (tmp_path / "some.txt").write_text("w1 w2 w3\nw4 w5\n")
    found = judged([tmp_path / "a"], resolve([], None, data=tmp_path / "some.txt"), memory, Settings()).models[0]
    task = found.tasks["some"]
    assert task.metric == "bits_per_byte,none"
    assert task.value == pytest.approx(5 * 5 / (8 + 5), rel=1e-5)
    assert len(task.items) == 2


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


def test_an_interrupted_evaluation_says_whether_answers_are_kept(tmp_path: Path) -> None:
    def interrupted(answers: int) -> None:
        with Memory(tmp_path / "answers.sqlite") as memory:
            memory.store_digest(b"file", "digest")
            for number in range(answers):
                memory.store(bytes([number]), "answer")
            raise KeyboardInterrupt

    for answers in (0, 2):
        with pytest.raises(KeyboardInterrupt) as stopped:
            interrupted(answers)
        assert is_kept(stopped.value) == bool(answers)


def test_merges_on_the_fly_that_a_kill_left_are_removed_by_the_next(tmp_path: Path) -> None:
    killed = """import os, sys
from merge.output.scratch import scratch
with scratch("x-", sys.argv[1]):
    os._exit(9)
"""
    for _ in range(2):
        subprocess.run([sys.executable, "-c", killed, str(tmp_path)], check=False, timeout=60)
        assert len(list(tmp_path.iterdir())) == 1
    with scratch("x-", tmp_path) as one, scratch("x-", tmp_path) as other:
        assert sorted(tmp_path.iterdir()) == sorted([one, other])  # what is in use stays
    assert list(tmp_path.iterdir()) == []


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


def test_a_quick_look_is_thirty_items_a_task(tmp_path: Path, run_cli: Callable[..., Any]) -> None:
    asked = ("eval", FAMILY / "base", "--suite", "quickstart", "--tasks", "add", "--quick", "--json", "--quiet")
    done = run_cli([*asked, "--cache", tmp_path / "answers.sqlite"])
    assert done.code == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["settings"]["limit"] == 30
    assert found["models"][0]["tasks"]["add"]["n"] == 30
    both = run_cli([*asked, "--limit", "5"])
    assert both.code == 2
    assert "--quick and --limit" in both.stderr


def test_compare_from_the_command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Models, then the saved results; a card that still verifies."""
    monkeypatch.setenv("MERGE_EVAL_CACHE", str(tmp_path / "answers.sqlite"))
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.chdir(tmp_path)

    def compare(*words: object) -> str:
        return CliRunner().invoke(cli, ["compare", *map(str, words)], catch_exceptions=False).stdout

    out = tmp_path / "out"
    run_plan(build_plan(load_recipe(FAMILY.with_suffix(".yaml"))), out)
    models = [FAMILY / name for name in ("base", "reverse", "sort", "add")]
    first = compare(*models, out, "--suite", "quickstart", "--limit", 6, "-o", "r.json", "--json", "--quiet")
    assert json.loads(first)["merges"][0]["parents"] == ["base", "reverse", "sort", "add"]
    shown = compare("r.json", "--csv", "t.csv", "--markdown", "t.md", "--html", "p.html", "--card", out)
    assert shown.splitlines()[-4:] == ["csv: t.csv", "markdown: t.md", f"card: {out}/README.md", "page: p.html"]
    assert "out is " in shown
    assert all((tmp_path / name).stat().st_size for name in ("t.csv", "t.md", "p.html"))
    assert verify_output(out).problems == ()
    assert json.loads(compare("r.json", "--json")) == json.loads(first)
    hole = json.loads((tmp_path / "r.json").read_text())
    hole["models"][0]["tasks"].pop("reverse")
    (tmp_path / "hole.json").write_text(json.dumps(hole))
    for wrong, said in (
        (["r.json", "--suite", "quickstart"], "--suite: saved results are compared as they are"),
        (["r.json", out], "results and models at once"),
        (["r.json", "--parents", "nobody"], 'no results for "nobody"'),
        (["r.json", "--card", "nowhere"], "--card nowhere: there is no such directory"),
        (["none.json"], "none.json: holds no results of merge eval"),
        (["hole.json"], "hole.json: holds no results of merge eval .*'base': has no score of 'reverse'"),
        (["r.json", "--html", out], "--html .*out: is a directory"),
    ):
        with pytest.raises(UsageError, match=said):
            compare(*wrong)


def test_files_are_written_whole_and_devices_stay_devices(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with subprocess.Popen(["cat", str(tmp_path / "pipe")], stdout=subprocess.PIPE) as reader:
        write_text(tmp_path / "pipe", "text")
        assert reader.communicate(timeout=60)[0] == b"text"
    assert (tmp_path / "pipe").is_fifo()
    write_text(tmp_path / "new" / "file", "text")
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["file"]
    with pytest.raises(OutputError, match=r"file/below: cannot be written"):
        write_text(tmp_path / "new" / "file" / "below", "text")


def test_the_cache_is_where_it_is_said_to_be(tmp_path: Path) -> None:
    (tmp_path / "text").write_text("not a database, but long enough to be read as the head of one" * 20)
    with pytest.raises(UsageError, match=r"text: cannot be used to remember answers .* --cache"):
        Memory(tmp_path / "text")
    assert not os.path.exists(tmp_path / "text-wal")
