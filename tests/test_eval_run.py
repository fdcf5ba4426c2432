"""Evaluations: recipes are judged as what they write; tasks and lines that are wrong are named; what is written."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import judging
import numpy as np
import pytest
from click.testing import CliRunner
from judging import Run, judged
from lm_eval.tasks import TaskManager

import eval.items
from eval.compare import compare
from eval.difference import difference
from eval.html import page
from eval.memory import Memory
from eval.results_file import load_results
from eval.sandbox import guard
from eval.settings import Settings
from eval.tables import as_data, as_markdown
from eval.tasks import resolve
from merge import build_plan, load_recipe, run_plan, verify_output
from merge.cli import cli
from merge.cli.judging import write_text
from merge.errors import MergeError, NumbersError, OutputError, UsageError
from merge.output.scratch import scratch

memory, tiny, choices = judging.memory, judging.tiny, judging.choices  # fixtures

ROOT = Path(__file__).resolve().parent.parent
FAMILY = ROOT / "recipes" / "quickstart"


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


@pytest.mark.parametrize(("answer", "tokens"), [("Paris", 7), ("", 3), ("日本", 8), ("x" * 200, 64)])
def test_a_text_ends_soon_after_no_more_answer_is_as_long(tmp_path: Path, answer: str, tokens: int) -> None:
    path = tmp_path / "q.jsonl"
    path.write_text("".join(json.dumps({"question": "q", "answer": text}) + "\n" for text in ("a", answer)))
    (task,) = resolve([str(path)], None)
    assert isinstance(task.spec, dict)
    assert task.spec["generation_kwargs"] == {"until": ["\n"], "max_gen_toks": tokens, "do_sample": False}


def test_unknown_names_have_suggestions(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r'unknown task "arc_esay"; did you mean "arc_easy"'):
        resolve(["arc_esay"], None)
    with pytest.raises(UsageError, match='unknown task "core_lookup"; it belongs to the suite core: add --suite core'):
        resolve(["core_lookup"], None)
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
        (["none.json"], "none.json: cannot be read"),
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
