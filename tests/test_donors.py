"""Whose config.json and tokenizer the result gets, what its head says, and what the model card calls it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import TOKENIZER, write_json, write_safetensors

from merge.errors import RecipeError
from merge.jobs.build import build_plan
from merge.output.task import task_of
from merge.plan import Plan
from merge.planning.load import parse_recipe

LINEAR = "merge_method: linear\nmodels: [{model: ./a}, {model: ./b}]\nparameters: {weight: 1}\n"


@pytest.fixture
def models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, make_model: Callable[..., Path]) -> Path:
    for seed, name in enumerate(("a", "b", "base"), 1):
        make_model(tmp_path / name, seed=seed)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def set_config(path: Path, **values: Any) -> None:
    config = {**json.loads((path / "config.json").read_text()), **values}
    write_json(path / "config.json", {key: value for key, value in config.items() if value is not None})


def plan(text: str) -> Plan:
    return build_plan(parse_recipe(text, "r.yaml"))


def text_of(plan: Plan, name: str) -> str:
    return next(side.text or "" for side in plan.side_files if side.name == name)


def config_of(plan: Plan) -> dict[str, Any]:
    config: dict[str, Any] = json.loads(text_of(plan, "config.json"))
    return config


def test_a_config_without_model_type_gives_way_to_one_that_has_it(models: Path) -> None:
    set_config(models / "a", model_type=None)
    made = plan(LINEAR)
    assert config_of(made)["model_type"] == "llama"
    assert "config.json of ./a has no model_type; that of ./b is taken" in made.notes
    set_config(models / "b", model_type=None)
    said = "config.json of ./a has no model_type, and so will that of the result: nothing loads it"
    assert said in plan(LINEAR).notes


def test_config_donor_and_tokenizer_donor_choose(models: Path) -> None:
    set_config(models / "b", rope_theta=500000.0)
    tokenizer = {**TOKENIZER, "model": {**TOKENIZER["model"], "unk_token": None}}
    write_json(models / "b" / "tokenizer.json", tokenizer)
    made = plan(LINEAR)
    assert "rope_theta" not in config_of(made)
    made = plan(LINEAR + "config_donor: ./b\n")
    assert config_of(made)["rope_theta"] == 500000.0
    sources = {side.name: side.source for side in made.side_files}
    assert sources["tokenizer.json"] == str(models / "b" / "tokenizer.json")
    made = plan(LINEAR + "config_donor: ./b\ntokenizer_donor: ./a\n")
    assert config_of(made)["rope_theta"] == 500000.0
    sources = {side.name: side.source for side in made.side_files}
    assert sources["tokenizer.json"] == str(models / "a" / "tokenizer.json")


def test_a_base_stays_the_base_beside_another_donor(models: Path) -> None:
    text = "merge_method: task_arithmetic\nbase_model: ./base\n" + LINEAR.partition("\n")[2]
    tokenizer = {**TOKENIZER, "model": {**TOKENIZER["model"], "unk_token": None}}
    write_json(models / "base" / "tokenizer.json", tokenizer)
    made = plan(text + "config_donor: ./b\ntokenizer_source: base\n")
    assert made.base_model is not None
    assert made.models[made.base_model].ref == "./base"
    assert {made.models[step.base_model or 0].ref for step in made.steps} == {"./base"}
    sources = {side.name: side.source for side in made.side_files}
    assert sources["tokenizer.json"] == str(models / "base" / "tokenizer.json")


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ("config_donor: ./base\n", '"config_donor" must be a model of this recipe, not "./base"; did you mean'),
        ("tokenizer_donor: ./nope\n", 'there is no directory "./nope"'),
        ("tokenizer_donor: ./a\ntokenizer_source: union\n", '"tokenizer_source" arranges tokens and chooses their'),
    ],
)
def test_donors_that_cannot_be_are_refused(models: Path, more: str, message: str) -> None:
    with pytest.raises(RecipeError) as raised:
        plan(LINEAR + more)
    assert message in str(raised.value)


def test_configs_that_differ_in_a_field_that_matters_are_named_in_one_note(models: Path) -> None:
    set_config(models / "a", rope_parameters={"rope_theta": 1e4, "rope_type": "default"}, eos_token_id=2)
    set_config(models / "b", rope_parameters={"rope_theta": 5e5, "rope_type": "default"}, hidden_act="gelu")
    set_config(models / "b", transformers_version="4.1", use_cache=False, attention_dropout=0.1, dtype="float16")
    (note,) = (note for note in plan(LINEAR).notes if note.startswith("config.json is that of"))
    assert note == (
        "config.json is that of ./a; ./b has rope_parameters.rope_theta 500000.0 in place of 10000.0, eos_token_id "
        "None in place of 2, hidden_act 'gelu' in place of None (\"config_donor\" chooses)"
    )
    set_config(models / "b", rope_parameters={"rope_theta": 1e4, "rope_type": "default"}, hidden_act=None)
    set_config(models / "b", eos_token_id=2, head_dim=None)
    assert not any(note.startswith("config.json is") for note in plan(LINEAR).notes)


def test_a_base_without_tokenizer_gets_another_input_s(models: Path) -> None:
    for file in ("tokenizer.json", "tokenizer_config.json"):
        (models / "a" / file).unlink()
    made = plan(LINEAR)
    assert "./a has no tokenizer files; those of ./b are taken" in made.notes
    assert {side.name for side in made.side_files} >= {"tokenizer.json", "tokenizer_config.json"}


# --- heads ---------------------------------------------------------------------------------------------------------


def bert(path: Path, architecture: str, labels: int | None = None, named: bool = False) -> None:
    """An encoder of one matrix a layer, with a classifier of so many labels."""
    path.mkdir()
    names = ["embeddings.word_embeddings", "encoder.layer.0.output.dense", "encoder.layer.1.output.dense"]
    tensors = {f"bert.{name}.weight": (np.ones((8, 8), np.float32), "float32") for name in names}
    config: dict[str, Any] = {"model_type": "bert", "num_hidden_layers": 2, "architectures": [architecture]}
    if labels is not None:
        tensors["classifier.weight"] = (np.ones((labels, 8), np.float32), "float32")
    if named:
        config["id2label"] = {str(i): f"kind {i}" for i in range(labels or 0)}
        config["label2id"] = {f"kind {i}": i for i in range(labels or 0)}
    write_safetensors(path / "model.safetensors", tensors)
    write_json(path / "config.json", config)


@pytest.mark.parametrize("named", [True, False])
def test_labels_and_class_follow_the_head_that_was_merged(models: Path, named: bool) -> None:
    bert(models / "encoder", "BertForMaskedLM")
    bert(models / "c", "BertForSequenceClassification", 50, named)
    bert(models / "d", "BertForSequenceClassification", 50, named)
    text = LINEAR.replace("./a", "./encoder").replace("{model: ./b}", "{model: ./c}, {model: ./d}")
    made = plan(text + "allow: [missing_tensors]\n")
    config = config_of(made)
    assert config["architectures"] == ["BertForSequenceClassification"]
    assert len(config["id2label"]) == len(config["label2id"]) == 50
    assert config["id2label"]["7"] == ("kind 7" if named else "LABEL_7")
    assert "pipeline_tag: text-classification" in text_of(made, "README.md")
    assert "labels: 50, as many as the head has rows" in made.notes


def test_a_donor_whose_labels_fit_keeps_them(models: Path) -> None:
    bert(models / "c", "BertForSequenceClassification", 2)
    bert(models / "d", "BertForSequenceClassification", 2, named=True)
    config = config_of(plan(LINEAR.replace("./a", "./c").replace("./b", "./d")))
    assert "id2label" not in config


# --- the model card ------------------------------------------------------------------------------------------------

TASKS = [
    ({"architectures": ["LlamaForCausalLM"]}, "text-generation"),
    ({"architectures": ["GPT2LMHeadModel"]}, "text-generation"),
    ({"architectures": ["BertForTokenClassification"]}, "token-classification"),
    ({"architectures": ["BertModel"]}, "feature-extraction"),
    ({"architectures": ["ViTModel"], "image_size": 224}, "image-feature-extraction"),
    ({"architectures": ["CLIPModel"], "vision_config": {}, "text_config": {}}, "zero-shot-image-classification"),
    ({"architectures": ["T5ForConditionalGeneration"]}, "text2text-generation"),
    ({"architectures": ["WhisperForConditionalGeneration"], "num_mel_bins": 80}, "automatic-speech-recognition"),
    ({"architectures": ["LlavaForConditionalGeneration"], "vision_config": {}}, "image-text-to-text"),
    ({"architectures": ["SomethingNew"]}, None),
    ({}, None),
]


@pytest.mark.parametrize(("config", "task"), TASKS, ids=[str(task) for _, task in TASKS])
def test_the_task_is_that_of_the_class(config: dict[str, Any], task: str | None) -> None:
    assert task_of(config) == task


def test_the_tasks_are_transformers_own() -> None:
    """Every class that transformers loads for a task, apart from those that it loads for several."""
    from transformers.models.auto import modeling_auto as auto

    tasks = {
        "CAUSAL_LM": "text-generation",
        "SEQUENCE_CLASSIFICATION": "text-classification",
        "TOKEN_CLASSIFICATION": "token-classification",
        "QUESTION_ANSWERING": "question-answering",
        "MULTIPLE_CHOICE": "multiple-choice",
        "OBJECT_DETECTION": "object-detection",
        "VIDEO_CLASSIFICATION": "video-classification",
        "CTC": "automatic-speech-recognition",
    }
    oddly_named = {"BertGenerationDecoder", "ReformerModelWithLMHead", "XLMWithLMHeadModel"}
    for mapping, task in tasks.items():
        named = getattr(auto, f"MODEL_FOR_{mapping}_MAPPING_NAMES").values()
        classes = [name for entry in named for name in ([entry] if isinstance(entry, str) else entry)]
        usual = [name for name in classes if name not in oddly_named and not name.endswith("ForConditionalGeneration")]
        assert {name: task_of({"architectures": [name]}) for name in usual} == dict.fromkeys(usual, task)


def test_a_model_card_without_a_known_task_names_none(models: Path) -> None:
    set_config(models / "a", architectures=None)
    assert "pipeline_tag" not in text_of(plan(LINEAR), "README.md")
