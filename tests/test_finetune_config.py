"""The config of merge finetune: file and flags, and what is said about wrong ones."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import yaml

from finetune.config import from_record, load_config
from finetune.foreign import FOREIGN
from finetune.keys import KEYS, TRAIN, Config, DataSource
from finetune.objectives import OBJECTIVES
from finetune.record import as_yaml
from finetune.trainables import TRAINABLES
from merge.errors import RecipeError

GOOD = "model: base\ndata: a.jsonl\nout: tuned\n"


def problems(tmp_path: Path, text: str, **flags: list[str]) -> list[str]:
    file = tmp_path / "c.yaml"
    file.write_text(text, encoding="utf-8")
    with pytest.raises(RecipeError) as caught:
        load_config(str(file), flags)
    return [str(problem).removeprefix(f"{tmp_path}/") for problem in caught.value.problems]


def test_file_and_flags_give_the_same_config(tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    file.write_text(
        GOOD
        + "train: lora\nrank: 8\nlearning_rate: 2e-4\nvalidation: 0.05\ndora: true\ntarget_modules: [q_proj, v_proj]\n"
        "rank_pattern: {q_proj: 4}\n",
        encoding="utf-8",
    )
    flags = {
        "model": ["base"],
        "data": ["a.jsonl"],
        "out": ["tuned"],
        "train": ["lora"],
        "rank": ["8"],
        "learning_rate": ["2e-4"],
        "validation": ["0.05"],
        "dora": ["true"],
        "target_modules": ["q_proj,v_proj"],
        "rank_pattern": ["{q_proj: 4}"],
    }
    config = load_config(str(file))
    assert config == load_config(None, flags)
    assert (config.learning_rate, config.validation, config.rank_pattern) == (2e-4, 0.05, {"q_proj": 4})


def test_a_flag_stands_over_the_file(tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    file.write_text(GOOD + "rank: 8\n", encoding="utf-8")
    assert load_config(str(file), {"rank": ["64"]}).rank == 64


def test_data_entries_have_keys_of_their_own(tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    file.write_text(
        "model: base\nout: o\ndata:\n- {path: a.csv, prompt: 'Q: {q} ', completion: '{a}', weight: 3, task: qa}\n"
        "- {path: b.jsonl, weight: 1}\nvalidation: held.jsonl\n",
        encoding="utf-8",
    )
    config = load_config(str(file))
    assert config.data == (
        DataSource("a.csv", None, "Q: {q} ", "{a}", None, 3.0, "qa"),
        DataSource("b.jsonl", weight=1.0),
    )
    assert config.validation == (DataSource("held.jsonl"),)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("modle: x\n" + GOOD, ['c.yaml:1: unknown key "modle"; did you mean "model"?']),
        (GOOD + "rank: 0\n", ['c.yaml:4: "rank" must be a whole number of at least 1, not 0']),
        (GOOD + "rank: many\n", ['c.yaml:4: "rank" must be a whole number of at least 1, not "many"']),
        (GOOD + "train: loar\n", ['c.yaml:4: unknown train "loar"; did you mean "lora"?']),
        (GOOD + "train: full\nrank: 8\n", ['c.yaml:5: "rank" belongs to train: lora or qlora; this is train: full']),
        ("data: a.jsonl\nout: o\n", ['c.yaml:1: "model" is missing: what to train']),
        (
            GOOD + "prompt_loss_weight: 1.5\n",
            ['c.yaml:4: "prompt_loss_weight" must be a number from 0 to 1, not 1.5'],
        ),
        (GOOD + "epochs: .inf\n", ['c.yaml:4: "epochs" must be a number above 0, not .inf']),
        (GOOD + "dora: maybe\n", ['c.yaml:4: "dora" must be true or false, not "maybe"']),
        (GOOD + "prompt: 'Q: {q}'\n", ['c.yaml:1: templates come in pairs: "completion" is missing']),
        (
            GOOD + "early_stopping: 3\n",
            ['c.yaml:4: "early_stopping" needs "validation": a share of the data such as 0.05, or a file'],
        ),
        (
            GOOD + "train: partial\n",
            ["c.yaml:4: train: partial needs one of freeze_first, train_last, freeze or train_only"],
        ),
        (
            GOOD + "train: prefix\ngradient_checkpointing: true\n",
            ["c.yaml:5: prefix tuning feeds keys and values, which checkpointing cannot recompute"],
        ),
        (
            GOOD + "train: prompt\npacking: true\n",
            ["c.yaml:5: train: prompt puts its tokens before a row, so rows cannot be packed"],
        ),
        (
            "model: m\nout: o\ndata: [{path: a.jsonl, weight: 1}, b.jsonl]\n",
            ['c.yaml:3: give every entry of "data" a weight, or none'],
        ),
        (
            "model: m\nout: o\ndata: [{file: a.jsonl}]\n",
            [
                'c.yaml:3: unknown key "file"; known: path, subset, split, format, prompt, completion, text, '
                "ignore_columns, weight, task",
                'c.yaml:3: an entry of "data" needs the key "path": the file, or a hub id',
            ],
        ),
        (GOOD + "validation: 0.99\n", ['c.yaml:4: "validation" must be a number above 0 and at most 0.9, not 0.99']),
        ("", ["c.yaml: the config is empty; it needs at least model and data"]),
        (
            "- a\n",
            ['c.yaml:1: the config is not a mapping of keys to values; it begins with lines such as "model: org/base"'],
        ),
    ],
)
def test_wrong_configs_are_explained(tmp_path: Path, text: str, expected: list[str]) -> None:
    assert problems(tmp_path, text) == expected


def test_every_problem_is_said_at_once(tmp_path: Path) -> None:
    assert len(problems(tmp_path, "data: a\nrnak: 3\nepochs: -1\nseed: x\n")) == 5  # model and out are missing too


def test_a_wrong_flag_is_named(tmp_path: Path) -> None:
    assert problems(tmp_path, GOOD, batch_size=["none"]) == [
        '--batch-size: "batch_size" must be a whole number of at least 1, not "none"'
    ]


def test_the_card_s_yaml_is_the_config(tmp_path: Path) -> None:
    config = Config(
        model="m",
        data=(DataSource("a.jsonl", task="x"),),
        out="o",
        train="lora",
        rank=4,
        validation=0.1,
        target_modules=("q_proj",),
        rank_pattern={"q_proj": 2},
    )
    file = tmp_path / "c.yaml"
    file.write_text(as_yaml(config), encoding="utf-8")
    assert load_config(str(file)) == config
    assert set(yaml.safe_load(as_yaml(config))) == {
        "model",
        "data",
        "out",
        "train",
        "validation",
        "rank",
        "target_modules",
        "rank_pattern",
    }


def test_a_record_gives_the_config_back() -> None:
    config = Config(model="m", data=(DataSource("a"),), out="o", validation=(DataSource("b"),), new_tokens=("x",))
    import json

    assert from_record(json.loads(json.dumps(dataclasses.asdict(config)))) == config


def test_tables_and_keys_name_the_same_things() -> None:
    assert tuple(TRAINABLES) == TRAIN == KEYS["train"].choices
    assert tuple(OBJECTIVES) == KEYS["objective"].choices
    assert all(only in TRAIN for key in KEYS.values() for only in key.only)


def test_keys_of_other_tools_are_sent_to_ours(tmp_path: Path) -> None:
    text = "model: m\ndata: d\nout: o\nlora_r: 8\nval_set_size: 0.1\nmodel_name_or_path: x\noutput_dir: y\n"
    assert problems(tmp_path, text) == [
        'c.yaml:4: unknown key "lora_r"; here it is "rank"',
        'c.yaml:5: unknown key "val_set_size"; here it is "validation" (a share, or a file)',
        'c.yaml:6: unknown key "model_name_or_path"; here it is "model"',
        'c.yaml:7: unknown key "output_dir"; here it is "out"',
    ]


def test_keys_of_other_tools_are_no_keys_here_and_lead_to_one() -> None:
    assert {key for key, _ in FOREIGN.values()} <= set(KEYS)
    assert not set(FOREIGN) & set(KEYS)
