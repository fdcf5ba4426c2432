"""merge finetune as it is typed: what --show prints, one run from end to end, and messages with their exit codes."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from tiny_llama import make_tiny_llama, words, write_lines

from merge.cli import cli
from merge.errors import MergeError, UsageError

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cli")
    make_tiny_llama(folder / "model")
    write_lines(folder / "data.jsonl", words(40))
    return folder


def invoke(*words: str | Path) -> Any:
    return CliRunner().invoke(cli, ["finetune", *map(str, words)])


def test_one_run_from_end_to_end_with_warnings_as_errors(
    run_cli: Callable[..., Any], place: Path, tmp_path: Path
) -> None:
    flags = ["--model", place / "model", "--data", place / "data.jsonl", "--validation", "0.2", "--device", "cpu"]
    done = run_cli(["finetune", *flags, "-o", "out", "--threads", "1", "--json"])
    assert (done.code, [line for line in done.stderr.splitlines() if line.startswith("merge:")]) == (0, [])
    report = json.loads(done.stdout)
    assert report["steps"] == 4
    lines = done.stderr.splitlines()
    assert lines[0].startswith("train: 32 examples, ")
    assert lines[1].startswith("validation: 8 examples, ")
    assert lines[2] == "lora: trains 32,768 of 116,928 parameters (28.02%)"
    assert lines[3].startswith("step 0/4: validation 4.")
    made = ["README.md", "adapter_config.json", "adapter_model.safetensors", "chat_template.jinja"]
    made += ["finetune_manifest.json", "loss.png", "tokenizer.json", "tokenizer_config.json", "training_log.json"]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == made


def test_show_prints_the_mask_and_trains_nothing(place: Path, tmp_path: Path) -> None:
    file = write_lines(tmp_path / "d.jsonl", [{"q": "ab", "a": "CD"}] * 3)
    done = invoke(
        "--model", place / "model", "--data", file, "--prompt", "{q}\\n", "--completion", "{a}", "--show", "1"
    )
    assert done.exit_code == 0
    assert done.output.splitlines() == [
        "train: 3 examples, 18 tokens, 15 in the loss; length 6 in the median, 6 at most",
        f"{file}:1: 6 tokens, 5 in the loss",
        "[0|a][0.1|b",
        "][1|CD<eos>]",
    ]
    assert list(tmp_path.iterdir()) == [file]


def test_the_example_config_is_right() -> None:
    done = invoke(ROOT / "recipes" / "finetune" / "sort.yaml", "--show", "1")
    assert done.exit_code == 0, done.exception
    assert "[0|s][0.1|ort:" in done.output


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], 'config: "model" is missing: what to train'),
        (["a.yaml", "b.yaml"], 'merge finetune: one config file, not "a.yaml b.yaml"'),
        (["nothing.yaml"], "nothing.yaml: cannot be read: No such file or directory"),
        (["continue"], "merge finetune continue: name the adapter's directory."),
        (["continue", "nowhere", "-o", "x"], "nowhere: not an adapter"),
        (["--model", "m", "--data", "d", "-o", "o", "--rank", "x"], '--rank: "rank" must be a whole number'),
    ],
)
def test_messages(words: list[str], message: str) -> None:
    done = invoke(*words)
    assert isinstance(done.exception, MergeError)
    assert message in str(done.exception)


def test_help_has_the_choices_and_the_defaults() -> None:
    text = " ".join(invoke("--help").output.split())
    assert "What is trained. One of full, partial, bitfit, lora, qlora," in text
    assert "Passes over the data. [default: 1]" in text
    assert "Quantise the scales of the weights too. (qlora) [default: true]" in text


def test_a_misspelt_flag_gets_the_nearest_one() -> None:
    done = invoke("--rnak", "8")
    assert done.exit_code == 2
    assert "--rank" in done.output


def test_a_model_may_stand_first(place: Path) -> None:
    done = invoke(place / "model", "--data", place / "data.jsonl", "--show", "1")
    assert done.exit_code == 0
    assert done.output.startswith("train: 40 examples")
    twice = invoke(place / "model", "--model", place / "model", "--data", place / "data.jsonl")
    assert isinstance(twice.exception, UsageError)
    assert "the model is named twice" in str(twice.exception)


def test_flags_of_other_tools_are_sent_to_ours(place: Path) -> None:
    done = invoke(place / "model", "--lora-r", "8")
    assert done.exit_code == 2
    assert "--lora-r" in done.output
    assert "--rank" in done.output


def test_columns_that_are_not_used_are_named(place: Path, tmp_path: Path) -> None:
    file = write_lines(tmp_path / "d.jsonl", [{"prompt": "a", "completion": "B", "source": "x"}] * 2)
    done = invoke(place / "model", "--data", file, "--show", "1")
    assert f"note: data {file}: format prompt_completion; columns not used: source" in done.output
