"""Training goes on after a kill and from an earlier adapter; nothing that is read or finished is replaced."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import training
from training import Killed, Run, kill_at, same, weights

from finetune.config import load_config
from finetune.prepare import prepare
from finetune.train import finetune
from merge.errors import CheckpointError, MergeError, OutputError, UsageError

place, run = training.place, training.run  # fixtures


@pytest.mark.parametrize("step", [5, 9])
def test_a_run_that_was_killed_ends_in_the_same_bits(run: Run, tmp_path: Path, step: int) -> None:
    keys: dict[str, Any] = {
        "train": "lora",
        "dropout": 0.2,
        "gradient_accumulation": 2,
        "batch_size": 8,
        "save_every": 2,
        "log_every": 3,
        "eval_every": 2,
    }
    whole = run(out="whole", **keys)
    with pytest.raises(Killed):
        run(out="killed", watch=kill_at(step), **keys)
    (tmp_path / "killed.partial" / "checkpoint-99").mkdir()  # as a kill leaves it that comes while one is written
    resumed = run(out="killed", **keys)
    assert resumed.resumed_from in (step - 1, step - 2)
    assert resumed.losses == whole.losses
    assert same(weights(tmp_path / "whole"), weights(tmp_path / "killed"))
    logs = [json.loads((tmp_path / name / "training_log.json").read_text("utf-8")) for name in ("whole", "killed")]
    timed = ("train_runtime", "train_samples_per_second", "train_steps_per_second", "train_loss")
    logs = [[{key: value for key, value in entry.items() if key not in timed} for entry in log] for log in logs]
    assert logs[0] == logs[1]


def test_continue_goes_on_from_an_adapter(run: Run, place: Path, tmp_path: Path) -> None:
    from finetune.adapters import adapter_defaults

    first = run(train="lora", rank=4, out="first")
    defaults = adapter_defaults(tmp_path / "first")
    assert (defaults["train"], defaults["rank"], defaults["batch_size"]) == ("lora", 4, 16)
    config = load_config(None, {"out": [str(tmp_path / "second")]}, defaults)
    second = finetune(prepare(config), device="cpu", threads=1)
    assert second.losses["validation_before"] == pytest.approx(first.losses["validation"], rel=1e-5)
    assert (second.losses["validation"] or 9) < (first.losses["validation"] or 0)
    with pytest.raises(MergeError, match='"rank" comes from the adapter'):
        load_config(None, {"out": ["x"], "rank": ["8"]}, defaults)
    with pytest.raises(MergeError, match="--train: the adapter being continued has train: lora"):
        load_config(None, {"out": ["x"], "train": ["full"]}, defaults)
    with pytest.raises(MergeError, match=r"not an adapter"):
        adapter_defaults(place / "model")


@pytest.mark.parametrize("train", ["prompt", "prefix"])
def test_continue_goes_on_from_a_learnt_prompt(run: Run, tmp_path: Path, train: str) -> None:
    from finetune.adapters import adapter_defaults

    first = run(train=train, out="first", **({"prompt_init": "abc"} if train == "prompt" else {}))
    config = load_config(None, {"out": [str(tmp_path / "second")]}, adapter_defaults(tmp_path / "first"))
    second = finetune(prepare(config), device="cpu", threads=1)
    assert second.losses["validation_before"] == pytest.approx(first.losses["validation"], rel=1e-5)
    assert second.trained_parameters == first.trained_parameters
    assert (second.losses["validation"] or 9) < (first.losses["validation"] or 0)


@pytest.mark.parametrize(("train", "keys"), [("ptuning", {}), ("prefix", {"encoder_hidden": 8})])
def test_a_prompt_encoder_cannot_be_gone_on_with(run: Run, tmp_path: Path, train: str, keys: dict[str, Any]) -> None:
    from finetune.adapters import adapter_defaults

    run(train=train, max_steps=1, **keys)
    with pytest.raises(CheckpointError, match="a prompt encoder cannot be continued: PEFT saves the prompt that"):
        adapter_defaults(tmp_path / "out")


def test_what_is_read_is_never_replaced(run: Run, place: Path) -> None:
    with pytest.raises(UsageError, match=r"holds the model, which this run reads; nothing was changed"):
        run(max_steps=1, out=place / "model", force=True)
    with pytest.raises(UsageError, match=r"holds .*\.jsonl, which this run reads|holds the model, which"):
        run(max_steps=1, out=place, force=True)
    assert (place / "model" / "model.safetensors").is_file()


def test_an_existing_result_and_other_unfinished_work_are_refused(run: Run, tmp_path: Path) -> None:
    run(max_steps=2)
    before = weights(tmp_path / "out")
    with pytest.raises(UsageError, match=r"out exists; nothing was changed"):
        run(max_steps=2)
    run(max_steps=2, force=True, seed=1)
    assert not same(before, weights(tmp_path / "out"))
    with pytest.raises(Killed):
        run(out="other", watch=kill_at(3))
    with pytest.raises(UsageError, match=r"unfinished training that differs in: rank, seed"):
        run(out="other", seed=2, rank=3)
    assert run(out="other", seed=2, rank=3, force=True).resumed_from == 0


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"train": "partial", "train_last": 3}, "train_last: 3, and the model has 2 layers"),
        ({"train": "partial", "freeze": "nothing_like_it"}, 'freeze: no parameter matches "nothing_like_it"; one is'),
        ({"train": "partial", "freeze": "("}, 'freeze: "(" is not a regular expression'),
        ({"train": "partial", "freeze": "."}, "leaves nothing to train in this model"),
        (
            {"target_modules": "q_porj"},
            'target_modules: no module of this model is called "q_porj"; did you',
        ),
        ({"rank_pattern": "{q_porj: 3}"}, 'rank_pattern: no module matches "q_porj"'),
        ({"target_modules": "q_proj,qproj"}, 'no module of this model is called "qproj"; did you mean "q_proj"?'),
        ({"modules_to_save": "wte"}, 'modules_to_save: no module of this model is called "wte"'),
        ({"rank_pattern": "{q_proj: 4.5}"}, 'the rank of "q_proj" must be a whole number, not 4.5'),
        ({"rank_pattern": "{'(': 4}"}, 'rank_pattern: "(" is not a regular expression'),
        ({"train": "ia3", "new_tokens": "@"}, "train: ia3 does not train embeddings"),
        (
            {"train": "bottleneck", "target_modules": "fc9"},
            'no module of this model is called "fc9"; known: ',
        ),
        ({"precision": "fp16"}, "fp16 needs a GPU"),
        ({"attention": "flash_attention_2"}, "attention: flash_attention_2 needs flash_attn: pip install"),
        ({"model": "no/such/model/here"}, 'there is no directory "no/such/model/here"'),
    ],
)
def test_what_does_not_fit_the_model_is_said_before_training(
    run: Run, tmp_path: Path, keys: dict[str, Any], message: str
) -> None:
    with pytest.raises(MergeError) as caught:
        run(**keys)
    assert message in str(caught.value)
    assert not (tmp_path / "out.partial").exists()


def test_no_space_for_checkpoints_is_said_before_training(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import shutil

    monkeypatch.setattr(shutil, "disk_usage", lambda path: type("Usage", (), {"free": 1000})())
    with pytest.raises(OutputError, match=r"checkpoints and result need about [0-9,]+ bytes(?:), and 1,000 are free"):
        run(train="full")
    assert not (tmp_path / "out.partial").exists()
