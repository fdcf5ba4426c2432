"""A tiny model with data, and training runs of it."""

from __future__ import annotations

import gc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny_llama import make_tiny_llama, words, write_lines

from finetune.config import load_config
from finetune.prepare import prepare
from finetune.train import TrainingReport, finetune

Run = Callable[..., TrainingReport]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tuning")
    make_tiny_llama(folder / "model")
    make_tiny_llama(folder / "biased", bias=True)
    write_lines(folder / "data.jsonl", words(120))
    gc.collect()
    gc.freeze()  # every run collects garbage, and looks through all of torch for it
    return folder


@pytest.fixture
def run(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """run(train="lora", out="x", ...) -> Report; flags as on the command line. No curve: it takes longest."""
    monkeypatch.setattr("finetune.result.draw_losses", lambda *_: None)

    def start(*, watch: Any = None, force: bool = False, **keys: Any) -> TrainingReport:
        usual = {
            "model": place / "model",
            "data": place / "data.jsonl",
            "out": "out",
            "batch_size": 16,
            "epochs": 2,
            "learning_rate": 1e-2,
            "validation": 0.2,
            "log_every": 1,
        }
        given = {**usual, **keys}
        given["out"] = tmp_path / given["out"]
        flags = {
            name: [str(value).lower() if isinstance(value, bool) else str(value)]
            for name, value in given.items()
            if value is not None
        }
        more = {} if watch is None else {"progress": watch}
        return finetune(prepare(load_config(None, flags)), device="cpu", threads=1, force=force, **more)

    return start


class Killed(BaseException):
    """Stands for a kill: nothing catches it."""


def kill_at(step: int) -> Callable[[int, int, dict[str, float]], None]:
    def watch(now: int, steps: int, logs: dict[str, float]) -> None:
        if now >= step:
            raise Killed

    return watch


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return {name: value for file in sorted(folder.glob("*.safetensors")) for name, value in load_file(file).items()}


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
