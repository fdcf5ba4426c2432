"""Tiny models with data for every objective, prepared and trained."""

from __future__ import annotations

import gc
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tiny_bert import make_tiny_bert
from tiny_llama import make_tiny_llama, words, write_lines
from toy_data import choices, judged, moods, rounds, shifts

from finetune.config import load_config
from finetune.prepare import Prepared, prepare
from finetune.train import TrainingReport, finetune

Run = Callable[..., TrainingReport]
Ready = Callable[..., Prepared]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("objectives")
    make_tiny_llama(folder / "llama")
    make_tiny_bert(folder / "bert")
    for name, rows in {
        "words": words,
        "rounds": rounds,
        "moods": moods,
        "choices": choices,
        "judged": judged,
        "shifts": shifts,
    }.items():
        write_lines(folder / f"{name}.jsonl", rows(120))
    gc.collect()
    gc.freeze()  # as in training.py
    return folder


@pytest.fixture
def ready(place: Path, tmp_path: Path) -> Ready:
    """ready(data="moods", model="bert", ...) -> Prepared; flags as on the command line."""

    def start(**keys: Any) -> Prepared:
        usual = {"model": "llama", "out": "out", "batch_size": 16, "epochs": 2, "learning_rate": 5e-3, "log_every": 50}
        given = {**usual, **keys}
        given["out"] = tmp_path / given["out"]
        for key, suffix in (("model", ""), ("data", ".jsonl")):
            if not isinstance(given[key], Path):
                given[key] = place / f"{given[key]}{suffix}"
        flags = {name: [str(value).lower() if isinstance(value, bool) else str(value)] for name, value in given.items()}
        return prepare(load_config(None, flags))

    return start


@pytest.fixture
def run(ready: Ready, monkeypatch: pytest.MonkeyPatch) -> Run:
    monkeypatch.setattr("finetune.result.draw_losses", lambda log, path, unit: None)

    def start(**keys: Any) -> TrainingReport:
        return finetune(ready(**{"validation": 0.25, **keys}), device="cpu", threads=1, force=True)

    return start


def record(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "finetune_manifest.json").read_text(encoding="utf-8"))
    return found
