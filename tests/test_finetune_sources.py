"""Files that a training reads and that change: while it goes on, and between a kill and its resume."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tiny_llama import make_tiny_llama, words, write_lines

from finetune.config import load_config
from finetune.prepare import prepare
from finetune.train import TrainingReport, finetune
from merge.errors import SourceChanged, StaleWork

CHANGING = (
    "model/model.safetensors",
    "model/config.json",
    "model/tokenizer.json",
    "data.jsonl",
    "lora/adapter_model.safetensors",
)


class Killed(BaseException):
    """Stands for a kill: nothing catches it."""


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sources")
    make_tiny_llama(folder / "model")
    write_lines(folder / "data.jsonl", words(16))
    train(folder, "lora", adapter=False)
    return folder


@pytest.fixture
def room(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A model, data, and an adapter to continue, as the working directory; no curves: they take longest."""
    shutil.copytree(place, tmp_path / "room")
    monkeypatch.chdir(tmp_path / "room")
    monkeypatch.setattr("finetune.result.draw_losses", lambda log, path, unit: None)
    return tmp_path / "room"


def train(
    room: Path, out: str = "out", at: int = 99, then: Callable[[], object] = lambda: None, adapter: bool = True
) -> TrainingReport:
    """Four steps with a checkpoint after each; `then` is called once step `at` is done."""
    keys: dict[str, Any] = {"model": room / "model", "data": room / "data.jsonl", "out": room / out, "max_steps": 4}
    keys |= {"batch_size": 8, "save_every": 1} | ({} if adapter else {"rank": 2})
    defaults = {"adapter": str(room / "lora")} if adapter else {}

    def watch(step: int, steps: int, logs: dict[str, float]) -> None:
        if step == at and not logs:
            then()

    config = load_config(None, {key: [str(value)] for key, value in keys.items()}, defaults)
    return finetune(prepare(config), device="cpu", threads=1, progress=watch)


def kill() -> None:
    raise Killed


def change(file: Path) -> None:
    """Another file of the same size and mtime, as `cp -p` and `rsync -a` leave it: other weights, or another space."""
    before, data = file.stat(), file.read_bytes()
    other = data[:-1] + bytes([data[-1] ^ 1]) if file.suffix == ".safetensors" else data.replace(b" ", b"\t", 1)
    assert other != data
    new = file.with_suffix(".new")
    new.write_bytes(other)
    os.utime(new, ns=(before.st_atime_ns, before.st_mtime_ns))
    os.replace(new, file)


@pytest.mark.parametrize("name", [CHANGING[0], CHANGING[2], CHANGING[3]])
def test_a_source_that_changes_while_training_goes_on(room: Path, name: str) -> None:
    kept = (room / name).read_bytes()
    with pytest.raises(SourceChanged, match=rf"{name}: was replaced or written to since the run was planned") as error:
        train(room, at=2, then=lambda: change(room / name))
    assert not isinstance(error.value, StaleWork)
    assert not (room / "out").exists()
    (room / name).write_bytes(kept)
    assert train(room).resumed_from == 2  # from the old file, which is there again


@pytest.mark.parametrize("name", CHANGING[:3:2])
def test_a_source_that_is_written_again_as_it_was(room: Path, name: str) -> None:
    def again() -> None:
        (room / name).write_bytes((room / name).read_bytes())
        os.utime(room / name)

    assert train(room, at=2, then=again).resumed_from == 0
    assert (room / "out").is_dir()


def test_a_source_that_is_removed(room: Path) -> None:
    with pytest.raises(SourceChanged, match=r"data\.jsonl: was there when the run was planned and is gone"):
        train(room, at=2, then=(room / "data.jsonl").unlink)


def test_a_source_that_changed_since_a_kill(room: Path) -> None:
    with pytest.raises(Killed):
        train(room, at=3, then=kill)
    for name in CHANGING:
        kept = (room / name).read_bytes()
        change(room / name)
        with pytest.raises(
            StaleWork, match=rf"out.partial holds unfinished work with other contents of .*{name}, which"
        ):
            train(room)
        (room / name).write_bytes(kept)  # an equal copy
    assert not (room / "out").exists()
    assert train(room).resumed_from == 2
