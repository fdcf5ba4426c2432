"""Objectives: what each learns from to the letter, that it learns, its figures."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import objectives
import pytest
import torch
from objectives import Ready, Run, record
from safetensors.torch import load_file
from tiny_llama import make_tiny_llama, write_lines
from toy_data import moods, rounds

from finetune.config import load_config
from finetune.objectives.classification import classification_metrics, detect_labels
from finetune.prepare import Prepared, prepare
from finetune.train import finetune

place, ready, run = objectives.place, objectives.ready, objectives.run  # fixtures

MARKS = "<|fim_prefix|>,<|fim_suffix|>,<|fim_middle|>"


def decoded(prepared: Prepared, number: int = 0) -> str:
    text: str = prepared.base.tokenizer.decode(prepared.data.train.examples[number].ids, skip_special_tokens=False)
    return text.replace(" ", "")


# ---- each learns
FULL = {"train": "full", "learning_rate": 3e-3, "epochs": 4}
LEARNING: dict[str, dict[str, Any]] = {
    "infilling": {"data": "rounds", "objective": "infilling", "new_tokens": MARKS, **FULL},
    "mlm": {"data": "rounds", "model": "bert", "objective": "mlm", "mask_copies": 2, **FULL},
    "classification": {"data": "moods", "model": "bert", **FULL},
    "classification with LoRA": {"data": "moods", "model": "bert", "learning_rate": 1e-2, "balance_classes": True},
    "classification with QLoRA": {"data": "moods", "model": "bert", "train": "qlora", "learning_rate": 1e-2},
    "classification by a model that writes": {"data": "moods", "learning_rate": 1e-2},
    "dpo": {"data": "choices"},
    "dpo in full": {"data": "choices", "train": "full", "learning_rate": 1e-3},
    "kto": {"data": "judged"},
    "embeddings": {"data": "shifts", "model": "bert", "objective": "embeddings", **FULL, "epochs": 8},
    "longer context": {"data": "words", "rope_scaling": "yarn", **FULL},
}
FIGURES = {
    "mlm": "accuracy",
    "classification": "matthews",
    "dpo": "reward_margin",
    "kto": "reward_margin",
    "embeddings": "reciprocal_rank",
}


@pytest.mark.parametrize("name", LEARNING)
def test_every_objective_learns(run: Run, tmp_path: Path, name: str) -> None:
    report = run(**LEARNING[name])
    before, after = report.losses["validation_before"], report.losses["validation"]
    assert before is not None
    assert after is not None
    assert after < before - 0.05
    figure = FIGURES.get(name.partition(" ")[0])
    if figure:
        assert report.metrics[figure][1] > report.metrics[figure][0]
        assert record(tmp_path / "out")["metrics"][figure] == list(report.metrics[figure])
        assert f"| {figure.replace('_', ' ')} |" in (tmp_path / "out" / "README.md").read_text(encoding="utf-8")


def test_distillation_learns_from_another_model(run: Run, tmp_path: Path) -> None:
    run(data="words", out="teacher", **FULL)
    settings = {"data": "words", "objective": "distillation", "teacher": tmp_path / "teacher", **FULL}
    report = run(**settings, distillation_alpha=1.0)
    assert report.metrics["teacher_kl"][1] < report.metrics["teacher_kl"][0] / 2
    assert report.metrics["label_loss"][1] < report.metrics["label_loss"][0]  # though it saw no label's loss
    loss = report.losses["validation"]
    assert loss == pytest.approx(4 * report.metrics["teacher_kl"][1], rel=1e-5)  # T^2 KL, with T = 2
    digests = record(tmp_path / "out")["teacher_weights_xxh3_128"]
    assert digests == record(tmp_path / "out")["teacher_weights_xxh3_128"]
    assert list(digests) == ["model.safetensors"]


def test_a_model_that_is_its_own_teacher_has_nothing_to_learn(ready: Ready, place: Path) -> None:
    from finetune.models import load_model

    settings = {"objective": "distillation", "teacher": place / "llama", "data": "words", "distillation_alpha": 1.0}
    prepared = ready(**settings)
    model = load_model(prepared.base, prepared.config, "AutoModelForCausalLM", "cpu").eval()
    prepared.objective.begin(model, prepared.data, prepared.config, "cpu")
    batch = prepared.objective.collate([prepared.data.train[i] for i in range(4)], 0)
    assert prepared.objective.loss(model, batch).abs().max() < 1e-5


# ---- infilling


def test_infilling_moves_the_middle_to_the_end(ready: Ready, tmp_path: Path) -> None:
    file = write_lines(tmp_path / "d.jsonl", [{"text": "abcdefghijklmnop"[:n]} for n in range(6, 16)])
    prepared = ready(data=file, objective="infilling", new_tokens=MARKS, infilling_rate=1.0, validation=0.5, epochs=1)
    moved = 0
    for number, example in enumerate(prepared.data.train.examples):
        prefix, rest = decoded(prepared, number).removeprefix("<|fim_prefix|>").split("<|fim_suffix|>")
        suffix, middle = rest.removesuffix("<eos>").split("<|fim_middle|>")
        assert "abcdefghijklmnop".startswith(prefix + middle + suffix)
        assert example.weights.tolist() == [0, *[1] * (len(example) - 1)]
        moved += bool(middle)
    assert moved >= 3
    assert prepared.data.validation is not None
    for example in prepared.data.validation.examples:  # the middle alone, with its end mark
        at = list(example.ids).index(prepared.base.tokenizer.convert_tokens_to_ids("<|fim_middle|>"))
        assert example.weights.tolist() == [0] * (at + 1) + [1] * (len(example) - at - 1)


def test_infilling_by_rate_and_seed_and_of_long_texts(ready: Ready, tmp_path: Path) -> None:
    def moved(**keys: Any) -> list[bool]:
        found = ready(data="rounds", objective="infilling", new_tokens=MARKS, **keys)
        return ["<|fim_middle|>" in decoded(found, i) for i in range(len(found.data.train))]

    assert not any(moved(infilling_rate=0.0))
    assert 30 < sum(moved()) < 90  # of 120, at a rate of 0.5
    assert moved() == moved()
    assert moved() != moved(seed=1)
    file = write_lines(tmp_path / "d.jsonl", [{"text": "ab" * 100}])
    long = ready(data=file, objective="infilling", new_tokens=MARKS, infilling_rate=1.0)
    assert len(long.data.train) == 4
    assert all(len(example) <= 64 for example in long.data.train.examples)
    assert sum(decoded(long, i).count("a") for i in range(4)) == 100


def test_infilling_tokens_can_be_named(ready: Ready) -> None:
    prepared = ready(data="rounds", objective="infilling", infilling_tokens="<user>,<assistant>,<end>")
    assert prepared.objective.record() == {"infilling_token_ids": [4, 5, 3]}


# ---- masked language modelling


def test_masks_are_15_percent_and_80_10_10(ready: Ready, tmp_path: Path) -> None:
    file = write_lines(tmp_path / "d.jsonl", [{"text": "abcdefghij" * 6}] * 1 + rounds(1) + [{"text": "a"}])
    prepared = ready(data=file, model="bert", objective="mlm", mask_copies=400, max_length=62)
    first, last = prepared.data.train.examples[:400], prepared.data.train.examples[-1]
    assert {int(example.weights.sum()) for example in first} == {9}  # 0.15 of 60
    assert int(last.weights.sum()) == 1  # at least one
    counts = {"mask": 0, "other": 0, "same": 0}
    for example in first:
        assert example.targets is not None
        chosen = example.weights > 0
        assert not chosen[0]
        assert not chosen[-1]  # [CLS] and [SEP]
        assert (example.ids[~chosen] == example.targets[~chosen]).all()
        for seen, true in zip(example.ids[chosen], example.targets[chosen], strict=True):
            counts["mask" if seen == 4 else "same" if seen == true else "other"] += 1
            assert seen == 4 or seen > 4
    shares = {name: count / 3600 for name, count in counts.items()}
    assert shares == pytest.approx({"mask": 0.8, "other": 0.1, "same": 0.1}, abs=0.03)


def test_masks_are_the_same_by_seed_and_of_whole_words_if_asked(ready: Ready, tmp_path: Path) -> None:
    file = write_lines(tmp_path / "d.jsonl", [{"text": "abc defg hij klmno pqr"}])

    def masks(**keys: Any) -> list[Any]:
        return ready(data=file, model="bert", objective="mlm", mask_copies=20, **keys).data.train.examples

    for one, two in zip(masks(), masks(), strict=True):
        assert (one.ids == two.ids).all()
    assert any((one.ids != two.ids).any() for one, two in zip(masks(), masks(seed=1), strict=True))
    (tmp_path / "elsewhere").mkdir()
    moved = write_lines(tmp_path / "elsewhere" / "e.jsonl", [{"text": "abc defg hij klmno pqr"}])
    there = ready(data=moved, model="bert", objective="mlm", mask_copies=20).data.train.examples
    assert all((one.ids == two.ids).all() for one, two in zip(masks(), there, strict=True))
    ends = np.cumsum([1, 3, 4, 3, 5, 3])
    for example in masks(whole_words=True):
        for start, end in itertools.pairwise(ends):
            assert len(set(example.weights[start:end].tolist())) == 1


# ---- classification


def test_figures_are_those_of_scikit_learn() -> None:
    metrics = pytest.importorskip("sklearn.metrics")
    rng = np.random.default_rng(0)
    true, found = rng.integers(0, 4, 200), rng.integers(0, 3, 200)
    found[:90] = true[:90]
    assert classification_metrics(true, found, 5) == pytest.approx(
        {
            "accuracy": metrics.accuracy_score(true, found),
            "macro_f1": metrics.f1_score(true, found, average="macro"),
            "matthews": metrics.matthews_corrcoef(true, found),
        }
    )
    assert classification_metrics(np.array([1, 1]), np.array([1, 1]), 2)["matthews"] == 0.0


def test_labels_are_detected_named_and_kept(run: Run, ready: Ready, tmp_path: Path) -> None:
    from collections import Counter

    from transformers import AutoModelForSequenceClassification

    assert detect_labels(Counter(["10", "9", "-1"])) == ("-1", "9", "10")
    assert detect_labels(Counter(["b", "a"])) == ("a", "b")
    run(data="moods", model="bert", train="full", max_steps=2)
    assert record(tmp_path / "out")["labels"] == ["flat", "high", "low"]
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out")
    assert model.config.id2label == {0: "flat", 1: "high", 2: "low"}
    # That model keeps its order, and its head, on data that has not all of its labels.
    rows = [row for row in moods(60) if row["label"] != "flat"]
    again = ready(data=write_lines(tmp_path / "two.jsonl", rows), model=tmp_path / "out")
    assert again.objective.record() == {"labels": ["flat", "high", "low"]}
    numbers = [{"text": "ab", "label": 1}, {"text": "c", "label": 0}]
    named = ready(data=write_lines(tmp_path / "n.jsonl", numbers), model="bert", labels="bad,good")
    assert [example.label for example in named.data.train.examples] == [1, 0]


def test_an_adapter_brings_the_head_that_its_base_lacks(run: Run, ready: Ready, tmp_path: Path, place: Path) -> None:
    from peft import PeftModel
    from transformers import AutoModelForSequenceClassification

    from merge.loading.bottleneck import load_bottlenecks
    from merge.loading.libraries import quiet_libraries

    data = {"data": "moods", "model": "bert", "learning_rate": 1e-2, "max_steps": 6}
    for train in ("lora", "bottleneck"):
        report = run(train=train, out=train, **data)
        torch.manual_seed(99)  # another random head
        with quiet_libraries():
            net = AutoModelForSequenceClassification.from_pretrained(place / "bert", num_labels=3)
            net = PeftModel.from_pretrained(net, tmp_path / train) if train == "lora" else net
            net = load_bottlenecks(net, tmp_path / train) if train == "bottleneck" else net
        config = load_config(
            None,
            {
                "model": [str(place / "bert")],
                "data": [str(place / "moods.jsonl")],
                "out": ["o"],
                "validation": ["0.25"],
            },
        )
        prepared = prepare(config)
        assert prepared.data.validation is not None
        rows = [prepared.data.validation[i] for i in range(len(prepared.data.validation))]
        with torch.no_grad():
            loss = prepared.objective.loss(net.eval(), prepared.objective.collate(rows, 0)).mean()
        assert float(loss) == pytest.approx(report.losses["validation"], rel=1e-4)


def test_class_weights(ready: Ready, tmp_path: Path) -> None:
    rows = [{"text": "ab", "label": "x"}] * 3 + [{"text": "c", "label": "y"}]
    file = write_lines(tmp_path / "d.jsonl", rows)

    def weights(**keys: Any) -> list[float]:
        prepared = ready(data=file, model="bert", **keys)
        batch = prepared.objective.collate([prepared.data.train[i] for i in range(4)], 0)
        return [round(weight, 4) for weight in prepared.objective.weights(batch).tolist()]

    assert weights() == [1, 1, 1, 1]
    assert weights(balance_classes=True) == [0.6667, 0.6667, 0.6667, 2]
    assert weights(class_weights="{y: 5}") == [1, 1, 1, 5]


# ---- embeddings


def test_equal_positives_and_anchors_are_not_wrong_answers(ready: Ready, tmp_path: Path) -> None:
    rows = [("a", "x"), ("b", "x"), ("a", "y"), ("c", "z")]
    triples = [{"anchor": anchor, "positive": positive, "negative": "q"} for anchor, positive in rows]
    prepared = ready(data=write_lines(tmp_path / "d.jsonl", triples), model="bert", objective="embeddings")
    batch = prepared.objective.collate([prepared.data.train[i] for i in range(4)], 0)
    assert batch["input_ids"].shape[0] == 12
    assert batch["wrong"].int().tolist() == [
        [0, 0, 0, 1, 1, 1, 1, 1],
        [0, 0, 1, 1, 1, 1, 1, 1],
        [0, 1, 0, 1, 1, 1, 1, 1],
        [1, 1, 1, 0, 1, 1, 1, 1],
    ]


def test_embeddings_do_not_depend_on_padding_and_say_how_they_are_made(run: Run, place: Path, tmp_path: Path) -> None:
    from transformers import AutoModel, AutoTokenizer

    from finetune.objectives.embeddings import embed

    run(data="shifts", model="bert", objective="embeddings", train="full", max_steps=1)
    net, tokenizer = AutoModel.from_pretrained(tmp_path / "out"), AutoTokenizer.from_pretrained(tmp_path / "out")
    with torch.no_grad():
        both = embed(net.eval(), tokenizer(["abc", "defghijkl"], padding=True, return_tensors="pt"))
        alone = embed(net, tokenizer(["abc"], return_tensors="pt"))
    assert torch.allclose(both[0], alone[0], atol=1e-5)
    assert both.norm(dim=1).tolist() == pytest.approx([1, 1])
    modules = json.loads((tmp_path / "out" / "modules.json").read_text(encoding="utf-8"))
    assert [module["path"] for module in modules] == ["", "1_Pooling", "2_Normalize"]
    assert all((tmp_path / "out" / module["path"]).is_dir() for module in modules)


# ---- longer contexts


@pytest.mark.parametrize("kind", ["linear", "dynamic", "yarn"])
def test_the_result_has_the_new_context(run: Run, tmp_path: Path, kind: str) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    file = write_lines(tmp_path / "d.jsonl", [{"text": "abc" * 30}, {"text": "bcd" * 33}] * 4)  # 64 is the old context
    report = run(data=file, rope_scaling=kind, rope_factor=2, max_length=128, too_long="error", train="full")
    assert report.steps == 2
    config = AutoConfig.from_pretrained(tmp_path / "out")
    assert config.rope_parameters["rope_type"] == kind
    assert config.rope_parameters["factor"] == 2
    assert config.max_position_embeddings == (64 if kind == "dynamic" else 128)
    net = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    with torch.no_grad():
        assert bool(torch.isfinite(net(torch.full((1, 120), 9)).logits).all())


# ---- what the trained weights must be


def test_qlora_keeps_its_base_in_4_bits_to_the_bit_and_moves_b(ready: Ready, monkeypatch: pytest.MonkeyPatch) -> None:
    from bitsandbytes.nn import Linear4bit

    from finetune import train

    seen: dict[str, Any] = {}
    make = train.make_trainable

    def watched(*arguments: Any) -> Any:
        seen["model"] = make(*arguments)
        seen["before"] = packed(seen["model"])
        return seen["model"]

    def packed(model: Any) -> dict[str, Any]:
        layers = {name: module for name, module in model.named_modules() if isinstance(module, Linear4bit)}
        return {name: module.weight.data.clone() for name, module in layers.items()}

    monkeypatch.setattr(train, "make_trainable", watched)
    finetune(ready(data="words", train="qlora", max_steps=3), device="cpu", threads=1)
    after = packed(seen["model"])
    assert len(after) == 14  # every linear layer of two
    assert {value.dtype for value in after.values()} == {torch.uint8}  # two weights in a byte
    assert all(torch.equal(value, seen["before"][name]) for name, value in after.items())
    b = {name: value for name, value in seen["model"].named_parameters() if "lora_B" in name}
    assert len(b) == 14
    assert all(bool((value != 0).any()) for value in b.values())


@pytest.mark.parametrize("train", ["lora", "ia3", "bottleneck", "bitfit"])
def test_frozen_means_bit_identical(ready: Ready, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, train: str) -> None:
    from finetune import train as module

    seen: dict[str, Any] = {}
    make = module.make_trainable

    def watched(*arguments: Any) -> Any:
        seen["model"] = make(*arguments)
        seen["before"] = {name: value.detach().clone() for name, value in seen["model"].named_parameters()}
        return seen["model"]

    monkeypatch.setattr(module, "make_trainable", watched)
    model = make_tiny_llama(tmp_path / "model", bias=True)
    finetune(ready(data="words", model=model, train=train, max_steps=2), device="cpu", threads=1)
    moved = frozen = 0
    for name, value in seen["model"].named_parameters():
        same = torch.equal(value, seen["before"][name])
        assert same or value.requires_grad, name
        moved += not same
        frozen += not value.requires_grad
    assert moved
    assert frozen
    if train == "bitfit":
        before, after = (load_file(folder / "model.safetensors") for folder in (model, tmp_path / "out"))
        assert all(torch.equal(before[name], after[name]) for name in before if not name.endswith("bias"))
