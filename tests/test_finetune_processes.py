"""Several processes: the losses and weights of one, one result, and an end of all when one ends."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from bad_inputs.room import call
from safetensors.torch import load_file
from tiny_llama import make_tiny_llama, words, write_lines

HERE = Path(__file__).resolve().parent
FSDP = {
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_VERSION": "2",
    "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    "FSDP_RESHARD_AFTER_FORWARD": "true",
    "FSDP_STATE_DICT_TYPE": "FULL_STATE_DICT",
}
Launch = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def launch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Launch:
    """launch(out, processes, mode, environment, key=value...) trains on 91 rows: 11 batches of 8 and a rest of 3.

    One process is this one, which has imported the libraries.
    """
    make_tiny_llama(tmp_path / "model")
    write_lines(tmp_path / "data.jsonl", words(114))

    def start(
        out: str, processes: int, mode: str = "plain", environment: dict[str, str] | None = None, **keys: Any
    ) -> subprocess.CompletedProcess[str]:
        usual = {
            "learning_rate": 3e-3,
            "log_every": 1,
            "eval_every": 3,
            "save_every": 3,
            "max_steps": 16,
            "train": "full",
        }
        flags = {"model": "model", "data": "data.jsonl", "validation": 0.2, "out": out, **usual, **keys}
        flags["batch_size"] = 8 // processes
        arguments = [text for name, value in flags.items() for text in (f"--{name.replace('_', '-')}", str(value))]
        arguments = ["finetune", *arguments, "--device", "cpu", "--threads", "1"]
        if processes == 1:
            with monkeypatch.context() as patch:
                patch.chdir(tmp_path)
                return subprocess.CompletedProcess(arguments, *call(arguments))
        torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
        return subprocess.run(
            [sys.executable, *torchrun, str(HERE / "several_processes.py"), mode, *arguments],
            cwd=tmp_path,
            env={
                **os.environ,
                "PYTHONPATH": str(HERE.parent),
                "OMP_NUM_THREADS": "1",
                "ACCELERATE_USE_CPU": "true",
                **(environment or {}),
            },
            capture_output=True,
            text=True,
            timeout=300,
        )

    return start


def losses(folder: Path) -> list[float]:
    log = json.loads((folder / "training_log.json").read_text(encoding="utf-8"))
    return [entry[key] for entry in log for key in ("loss", "eval_loss") if key in entry]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return {name: value for file in sorted(folder.glob("*.safetensors")) for name, value in load_file(file).items()}


def assert_equal(found: Path, wanted: Path) -> None:
    """Up to the order of sums: losses to 1e-4, weights to a step of bfloat16 where that is what is written."""
    assert losses(found) == pytest.approx(losses(wanted), rel=1e-4)
    assert len(losses(found)) == 16 + 7
    one, other = weights(found), weights(wanted)
    assert one.keys() == other.keys()
    for name, value in one.items():
        assert value.dtype == other[name].dtype
        torch.testing.assert_close(value.float(), other[name].float(), rtol=1e-2, atol=1e-3)
    assert {path.name for path in found.iterdir()} == {path.name for path in wanted.iterdir()}


@pytest.mark.full  # two processes import torch and train: 18 s
def test_two_processes_train_as_one_does(launch: Launch, tmp_path: Path) -> None:
    assert launch("one", 1).returncode == 0
    both = launch("two", 2)
    assert both.returncode == 0, both.stderr
    assert_equal(tmp_path / "two", tmp_path / "one")
    assert both.stdout.count("two: 16 steps") == 1
    assert both.stderr.count("step 16/16: loss") == 1


@pytest.mark.full
@pytest.mark.parametrize("end", ["killed:7", "failing:7"])
def test_when_one_process_ends_all_end_and_the_run_can_go_on(launch: Launch, tmp_path: Path, end: str) -> None:
    assert launch("one", 1).returncode == 0
    stopped = launch("two", 2, end)
    assert stopped.returncode != 0
    assert not (tmp_path / "two").exists()
    resumed = launch("two", 2)
    assert resumed.returncode == 0, resumed.stderr
    assert "resuming from step 6" in resumed.stderr
    assert_equal(tmp_path / "two", tmp_path / "one")
    assert not (tmp_path / "two.partial").exists()


@pytest.mark.full
@pytest.mark.parametrize(
    ("train", "state"),
    [("full", "FULL_STATE_DICT"), ("lora", "SHARDED_STATE_DICT"), ("bottleneck", "FULL_STATE_DICT")],
)
def test_sharded_parameters_train_as_whole_ones_do(launch: Launch, tmp_path: Path, train: str, state: str) -> None:
    sharded = {**FSDP, "FSDP_STATE_DICT_TYPE": state}
    assert launch("one", 1, train=train).returncode == 0
    stopped = launch("two", 2, "fsdp,killed:7", sharded, train=train)
    assert stopped.returncode != 0
    resumed = launch("two", 2, "fsdp", sharded, train=train)
    assert resumed.returncode == 0, resumed.stderr
    assert "resuming from step 6" in resumed.stderr
    assert_equal(tmp_path / "two", tmp_path / "one")


@pytest.mark.parametrize(
    ("environment", "keys", "message"),
    [
        (FSDP, {}, "FSDP: accelerate shards models over GPUs only"),
        ({"ACCELERATE_USE_DEEPSPEED": "true"}, {}, "DeepSpeed: accelerate shards models over GPUs only"),
    ],
)
def test_what_a_launch_would_not_do_is_said_before_training(
    monkeypatch: pytest.MonkeyPatch, environment: dict[str, str], keys: dict[str, Any], message: str
) -> None:
    from finetune.distributed import check_launch
    from finetune.keys import Config
    from merge.errors import UsageError

    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UsageError, match=message):
        check_launch(Config(**keys), "cpu")


@pytest.mark.parametrize(
    ("environment", "keys", "message"),
    [
        (FSDP, {"train": "qlora"}, "qlora cannot be combined with FSDP"),
        ({**FSDP, "FSDP_VERSION": "1"}, {}, "version 1 is not supported"),
        (FSDP, {"optimizer": "adamw_8bit"}, "adamw_8bit does not take"),
        (
            {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "3"},
            {"train": "qlora"},
            "qlora cannot be combined with ZeRO-3",
        ),
    ],
)
def test_what_cannot_be_sharded_is_said_before_training(
    monkeypatch: pytest.MonkeyPatch, environment: dict[str, str], keys: dict[str, Any], message: str
) -> None:
    from finetune.distributed import check_launch
    from finetune.keys import Config
    from merge.errors import UsageError

    check_launch(Config(**keys), "cuda")
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UsageError, match=message):
        check_launch(Config(**keys), "cuda")
