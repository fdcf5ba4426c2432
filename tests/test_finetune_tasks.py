"""Task files: what is wrong is said with its line, flags stand over all tasks, and those in recipes/ are right."""

from __future__ import annotations

from pathlib import Path

import pytest
from click.testing import CliRunner

from eval.exact_match import SKILLS
from finetune.before import is_task_file
from finetune.config import load_config
from finetune.strategies import load_tasks
from merge.cli import cli
from merge.errors import RecipeError, UsageError

ROOT = Path(__file__).resolve().parent.parent
FAMILY = ROOT / "recipes" / "quickstart"

HEAD = "model: m\nout: o\nvalidation: 0.1\n"
TWO = "tasks:\n  a: {data: a.jsonl}\n  b: {data: b.jsonl}\n"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (f"{HEAD}{TWO}", 't.yaml:1: "strategy" is missing: one or several of simultaneous, sequential, parallel'),
        (f"{HEAD}strategy: paralel\n{TWO}", 't.yaml:4: unknown strategy "paralel"; did you mean "parallel"?'),
        (f"{HEAD}strategy: parallel\n", '"tasks" is missing: a name for each, with its data'),
        (f"{HEAD}strategy: parallel\ntasks: {{a: {{data: a}}}}\n", "t.yaml:5: 1 task; several tasks are trained"),
        (f"{HEAD}strategy: parallel\ntaks: 3\n{TWO}", 't.yaml:5: unknown key "taks"; did you mean "tasks"?'),
        (
            f"{HEAD}strategy: parallel\ndata: x\n{TWO}",
            '"data" cannot be a shared key of a config with tasks; each task names its own',
        ),
        (f"{HEAD}strategy: parallel\n{TWO}  c/d: {{data: x}}\n", "t.yaml:8: the name of a task has letters, digits"),
        (
            f"{HEAD}strategy: parallel\n{TWO}  c: {{data: x, rnak: 3}}\n",
            'unknown key "rnak" of task "c"; did you mean "rank"?',
        ),
        (
            f"{HEAD}strategy: parallel\n{TWO}  c: {{data: x, train: full}}\n",
            '"train" is one for all tasks; move it beside',
        ),
        (f"{HEAD}strategy: parallel\n{TWO}  c: {{}}\n", '"data" is missing: what to train on'),
        (
            f"{HEAD}strategy: parallel\n{TWO}  c: {{data: x, epochs: 0}}\n",
            't.yaml:8: "epochs" must be a number above 0',
        ),
        (f"model: m\nout: o\nstrategy: parallel\n{TWO}", 't.yaml:5: task "a" has no "validation"'),
        (f"{HEAD}strategy: sequential\ntrain: ptuning\n{TWO}", "train: ptuning cannot be continued"),
        (
            f"{HEAD}strategy: sequential\ntrain: prefix\nencoder_hidden: 8\n{TWO}",
            "train: prefix with encoder_hidden cannot be continued",
        ),
        (f"{HEAD}strategy: sequential\n{TWO}merge: {{merge_method: ties}}\n", '"merge" belongs to strategy: parallel'),
        (
            f"{HEAD}strategy: parallel\ntrain: ia3\n{TWO}merge: {{merge_method: ties}}\n",
            "train: ia3 makes nothing that a recipe can merge",
        ),
        (f"{HEAD}strategy: parallel\ntrain: full\n{TWO}merge: {{merge_method: tise}}\n", "t.yaml:9: "),
        (f"{HEAD}strategy: parallel\ntrain: full\n{TWO}merge:\n- {{merge_method: ties, densty: 1}}\n", "densty"),
        (
            f"{HEAD}strategy: parallel\ntrain: full\n{TWO}merge: {{merge_method: ties, models: []}}\n",
            '"models" is filled in here',
        ),
        (
            f"{HEAD}strategy: parallel\ntrain: full\n{TWO}merge: {{merge_method: ties, fold: false}}\n",
            '"fold" belongs to train: lora or qlora',
        ),
        (
            f"{HEAD}strategy: parallel\ntrain: full\n{TWO}merge: {{merge_method: ties, tasks: {{x: {{weight: 1}}}}}}\n",
            '"x" is not a task; there are a, b',
        ),
        (f"{HEAD}strategy: simultaneous\n{TWO}  c: {{data: x, weight: 2}}\n", 'give every task a "weight", or none'),
        (f"{HEAD}strategy: simultaneous\n{TWO}  c: {{data: x, validation: y}}\n", "give every task the same share"),
        (f"{HEAD}strategy: parallel\nworkers: 0\n{TWO}", '"workers" must be a whole number from 1 to 64'),
    ],
)
def test_what_is_wrong_is_said_with_its_line(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "t.yaml").write_text(text)
    assert is_task_file(str(tmp_path / "t.yaml"))
    with pytest.raises(RecipeError) as caught:
        load_tasks(str(tmp_path / "t.yaml"))
    assert message in str(caught.value)


LORA = f"{HEAD}strategy: parallel\n{TWO}merge: "


@pytest.mark.parametrize(
    ("merge", "message"),
    [
        ("{merge_method: tiess, fold: false}", 't.yaml:8: unknown method "tiess"; did you mean "ties"?'),
        (
            "{merge_method: ties, fold: false, parameters: {weight: 1, densty: 1}}",
            'unknown key "densty"; did you mean "density"',
        ),
        ("{merge_method: ties, fold: false}", 't.yaml:8: ties needs the parameter "weight" for model "a"'),
        ("{merge_method: karcher, fold: false}", "t.yaml:8: karcher does not merge LoRA adapters"),
        ("{merge_method: cat, fold: false, parameters: {rank: 3}}", "cat keeps all of the adapters"),
        ("{merge_method: knots, fold: false, tokenizer_source: union}", '"tokenizer_source" is for whole models'),
        ("{merge_method: cat}", 'cat merges LoRA adapters, and these are models. Use train: lora and "fold: false"'),
        ("{experts: []}", "a mixture of experts is made with merge run"),
    ],
)
def test_a_merge_of_adapters_is_checked_by_its_text(tmp_path: Path, merge: str, message: str) -> None:
    (tmp_path / "t.yaml").write_text(LORA + merge)
    with pytest.raises(RecipeError) as caught:
        load_tasks(str(tmp_path / "t.yaml"))
    assert message in str(caught.value)


def test_flags_stand_over_all_tasks_and_some_do_not_go(tmp_path: Path) -> None:
    file = tmp_path / "t.yaml"
    file.write_text(f"{HEAD}strategy: parallel\n{TWO}")
    loaded = load_tasks(str(file), {"max_steps": ["7"]}, "sequential,parallel")
    assert (loaded.strategies, {task.config.max_steps for task in loaded.tasks}) == (("sequential", "parallel"), {7})
    with pytest.raises(RecipeError, match="--data: the config has tasks; each task names its own"):
        load_tasks(str(file), {"data": ["x"]})
    for words_, message in (
        ([str(file), "--show", "1"], "--show: the config has several tasks"),
        (["--workers", "2"], "--workers: only for a config with tasks"),
    ):
        done = CliRunner().invoke(cli, ["finetune", *words_])
        assert isinstance(done.exception, UsageError)
        assert message in str(done.exception)


@pytest.mark.parametrize("file", ["quickstart/strategies.yaml", "finetune/brown.yaml"])
def test_the_task_files_in_recipes_are_right(file: str) -> None:
    assert len(load_tasks(str(ROOT / "recipes" / file)).tasks) in (2, 3)


@pytest.mark.parametrize("skill", SKILLS)
def test_the_quickstart_configs_are_right(skill: str) -> None:
    config = load_config(str(FAMILY / f"{skill}.yaml"))
    both = {task.name: task.config for task in load_tasks(str(FAMILY / "strategies.yaml")).tasks}[skill]
    kept = ("model", "data", "validation", "train", "max_steps", "batch_size", "learning_rate", "warmup", "scheduler")
    assert [getattr(config, name) for name in kept] == [getattr(both, name) for name in kept]
