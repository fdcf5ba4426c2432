"""TensorBoard: its events are the numbers of training_log.json, once each, also after a kill."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
from tiny_llama import make_tiny_llama, words, write_lines

from finetune.config import load_config
from finetune.prepare import prepare
from finetune.train import finetune
from merge.errors import UsageError

installed = importlib.util.find_spec("tensorboard") is not None


def train(folder: Path, **more: Any) -> Any:
    flags = {
        "model": folder / "model",
        "data": folder / "data.jsonl",
        "validation": 0.2,
        "out": folder / "out",
        "batch_size": 16,
        "max_steps": 8,
        "eval_every": 2,
        "save_every": 2,
        "log_every": 1,
        "tensorboard": "true",
    }
    config = load_config(None, {name: [str(value)] for name, value in flags.items()})
    return finetune(prepare(config), device="cpu", threads=1, **more)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    make_tiny_llama(tmp_path / "model")
    write_lines(tmp_path / "data.jsonl", words(60))
    return tmp_path


class Killed(BaseException):
    """Stands for a kill: nothing catches it."""


def stop_at(last: int) -> Any:
    def watch(step: int, steps: int, logs: dict[str, float]) -> None:
        if step == last and not logs:
            raise Killed

    return watch


@pytest.mark.skipif(not installed, reason="tensorboard is not installed")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of tensorboard and protobuf
@pytest.mark.parametrize("kills", [(), (1,), (5, 7)])
def test_events_are_the_log_once_each(folder: Path, kills: tuple[int, ...]) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from transformers.integrations.integration_utils import rewrite_logs

    for step in kills:
        with pytest.raises(Killed):
            train(folder, progress=stop_at(step))
    train(folder)
    log = json.loads((folder / "out" / "training_log.json").read_text(encoding="utf-8"))
    wanted: dict[str, list[tuple[int, float]]] = {}
    for entry in log:
        numbers = {key: value for key, value in entry.items() if key not in ("step", "epoch")}
        for name, value in rewrite_logs(numbers).items():
            wanted.setdefault(name, []).append((entry["step"], value))
    events = EventAccumulator(str(folder / "out" / "tensorboard"), size_guidance={"scalars": 0}).Reload()
    assert set(wanted) | {"train/epoch"} == set(events.Tags()["scalars"])
    assert len(wanted["train/loss"]) == 8
    assert [step for step, _ in wanted["eval/loss"]] == [0, 2, 4, 6, 8]
    for name, points in wanted.items():
        found = [(event.step, event.value) for event in events.Scalars(name)]
        assert [step for step, _ in found] == [step for step, _ in points], name
        assert [value for _, value in found] == pytest.approx([value for _, value in points], rel=1e-6), name


def test_without_the_package_nothing_is_trained(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "tensorboard" else find(name))
    with pytest.raises(UsageError, match=r"needs tensorboard: pip install 'merge-workbench\[tensorboard\]'"):
        train(folder)
    assert not (folder / "out.partial").exists()
