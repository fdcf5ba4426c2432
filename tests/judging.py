"""Tiny models, tasks and a memory of answers, and evaluations of them."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from eval.harness import evaluate
from eval.memory import Memory
from eval.models import subjects
from eval.results import Results
from eval.settings import Settings
from eval.tasks.task import Task

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


def replace_weights(model: Path, other: Path) -> None:
    """The other model's weights in the model's place, with the size and mtime of the file that was there."""
    old, new = model / "model.safetensors", other / "model.safetensors"
    before = old.stat()
    os.utime(new, ns=(before.st_atime_ns, before.st_mtime_ns))
    os.replace(new, old)
    assert (old.stat().st_size, old.stat().st_mtime_ns) == (before.st_size, before.st_mtime_ns)
