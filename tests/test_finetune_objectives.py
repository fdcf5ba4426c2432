"""Objectives: what each learns from to the letter, that it learns, its figures, and what is said about wrong data."""

from __future__ import annotations

import gc
import itertools
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tiny_bert import make_tiny_bert
from tiny_llama import make_tiny_llama, words, write_lines
from toy_data import choices, judged, moods, rounds, shifts

from finetune.config import load_config
from finetune.data.pack import Row
from finetune.objectives.classification import classification_metrics, detect_labels
from finetune.train import Prepared, TrainingReport, finetune, prepare
from merge.errors import MergeError, RecipeError, UsageError

Run = Callable[..., TrainingReport]
Ready = Callable[..., Prepared]
MARKS = "<|fim_prefix|>,<|fim_suffix|>,<|fim_middle|>"


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
    gc.freeze()  # as in test_finetune_train.py
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


# ---- preferences


def test_dpo_starts_at_log_2_and_compares_answers_alone(run: Run, ready: Ready, tmp_path: Path) -> None:
    report = run(data="choices", train="lora", learning_rate=1e-2)
    assert report.losses["validation_before"] == pytest.approx(math.log(2), abs=1e-6)
    assert report.metrics["reward_margin"][0] == 0
    assert report.metrics["reward_accuracy"][0] == 0.5
    file = write_lines(tmp_path / "d.jsonl", [{"prompt": "ab=", "chosen": "AB", "rejected": "c"}])
    example = ready(data=file).data.train.examples[0]
    assert [weights.tolist() for _, weights in example.sequences] == [[0, 0, 0, 1, 1, 1], [0, 0, 0, 1, 1]]


@pytest.mark.parametrize("train", ["lora", "bottleneck", "prompt"])
def test_the_reference_is_the_model_without_its_adapter(ready: Ready, place: Path, train: str) -> None:
    """Rewards of a moved adapter, against log-probabilities computed here by hand."""
    from finetune.models import load_model
    from finetune.trainables import make_trainable
    from merge.loading.libraries import quiet_libraries

    prepared = ready(data="choices", train=train)
    base = load_model(prepared.base, prepared.config, "AutoModelForCausalLM", "cpu").eval()
    model = load_model(prepared.base, prepared.config, "AutoModelForCausalLM", "cpu")
    with quiet_libraries():
        model = make_trainable(model, prepared.config, "CAUSAL_LM", []).eval()
    torch.manual_seed(1)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.1 * torch.randn_like(parameter)
    prepared.objective.begin(model, prepared.data, prepared.config, "cpu")
    rows = [prepared.data.train[i] for i in range(3)]
    with torch.no_grad():
        losses, rewards = prepared.objective.measure(model, prepared.objective.collate(rows, 0))

    def log_p(net: Any, ids: Any, weights: Any) -> float:
        ids = torch.from_numpy(ids).long()[None]
        with torch.no_grad():
            found = net(ids).logits[:, -ids.shape[1] :].log_softmax(-1)[0, :-1]
        picked = found.gather(1, ids[0, 1:, None])[:, 0]
        return float((picked * torch.from_numpy(weights[1:])).sum())

    for row, loss, reward in zip(rows, losses, rewards, strict=True):
        pair = row.examples[0][1].sequences
        wanted = [0.1 * (log_p(model, *one) - log_p(base, *one)) for one in pair]
        assert reward.tolist() == pytest.approx(wanted, abs=1e-4)
        assert any(abs(value) > 1e-3 for value in wanted)
        assert float(loss) == pytest.approx(math.log(1 + math.exp(wanted[1] - wanted[0])), abs=1e-4)


def test_kto_by_hand(ready: Ready) -> None:
    """Losses of wanted and unwanted answers, from log-probabilities that are known."""

    class Fixed:
        """Every token has probability 1/V."""

        def __call__(self, input_ids: Any, **_: Any) -> Any:
            return type("Out", (), {"logits": torch.zeros(*input_ids.shape, 8)})()

    prepared = ready(data="judged", beta=0.5, wanted_weight=2.0, unwanted_weight=3.0)
    examples = [prepared.data.train.examples[i] for i in range(6)]
    small = [type(one)(one.ids % 8, one.weights, one.place, starts=one.starts, label=one.label) for one in examples]
    assert {one.label for one in small} == {0, 1}
    batch = prepared.objective.collate([Row([(i, one)], False) for i, one in enumerate(small)], 0)
    batch["reference"] = torch.tensor([[-30.0 - i, -40.0] for i in range(6)])  # the answer's, the foreign one's
    lengths = [[float(weights.sum()) for _, weights in one.sequences] for one in small]
    rewards = [0.5 * (-math.log(8) * own + 30.0 + i) for i, (own, _) in enumerate(lengths)]
    z = sum(0.5 * (-math.log(8) * foreign + 40.0) for _, foreign in lengths) / 6
    assert z > 0
    expected = [
        2.0 / (1 + math.exp(r - z)) if one.label else 3.0 / (1 + math.exp(z - r))
        for one, r in zip(small, rewards, strict=True)
    ]
    assert prepared.objective.loss(Fixed(), batch).tolist() == pytest.approx(expected, rel=1e-3)
    batch["reference"][:, 1] = 0.0  # foreign answers have lost: z is not below 0
    at_zero = prepared.objective.loss(Fixed(), batch)[0]
    weight, sign = (2.0, 1) if small[0].label else (3.0, -1)
    assert float(at_zero) == pytest.approx(weight / (1 + math.exp(sign * rewards[0])), rel=1e-3)


def test_label_smoothing(ready: Ready) -> None:
    class Fixed:
        """A model whose rewards are known: the reference is zero, log p of an answer its length times log 1/V."""

        def __call__(self, input_ids: Any, **_: Any) -> Any:
            return type("Out", (), {"logits": torch.zeros(*input_ids.shape, 8)})()

    prepared = ready(data="choices", label_smoothing=0.2, beta=0.5)
    example = prepared.data.train.examples[0]
    small = type(example)(example.ids % 8, example.weights, example.place, starts=example.starts)
    batch = prepared.objective.collate([Row([(0, small)], False)], 0)
    counts = [weights.sum() for _, weights in small.sequences]
    margin = 0.5 * math.log(8) * float(counts[1] - counts[0])
    wanted = 0.8 * math.log1p(math.exp(-margin)) + 0.2 * math.log1p(math.exp(margin))
    assert float(prepared.objective.loss(Fixed(), batch)) == pytest.approx(wanted, rel=1e-5)


def test_conversations_are_compared_by_their_last_turn(ready: Ready, tmp_path: Path) -> None:
    start = [{"role": "user", "content": "ab"}]
    rows = [{"chosen": [*start, answer("C")], "rejected": [*start, answer("dd")]}]
    prepared = ready(data=write_lines(tmp_path / "d.jsonl", rows))
    tokenizer = prepared.base.tokenizer
    found = [tokenizer.decode(ids[weights > 0]) for ids, weights in prepared.data.train.examples[0].sequences]
    assert found == ["C<end>", "dd<end>"]


def answer(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


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


# ---- wrong settings and data: one message each, before anything is trained

WRONG: list[tuple[dict[str, Any], list[dict[str, Any]], str]] = [
    ({"objective": "mlm"}, rounds(4), "the tokenizer has no mask token"),
    ({"objective": "infilling"}, rounds(4), "the tokenizer has no tokens for infilling. Name three of its tokens"),
    ({"objective": "infilling", "infilling_tokens": "<user>"}, rounds(4), "must be three tokens"),
    ({"objective": "infilling", "infilling_tokens": "<user>,<end>,<ned>"}, rounds(4), 'did you mean "<end>"?'),
    ({"mask_rate": 0.3}, words(4), '"mask_rate" belongs to objective: mlm; this is supervised'),
    ({"objective": "distillation"}, words(4), "needs teacher: the model to learn from"),
    ({"model": "bert", "packing": True}, moods(8), "packing: objective classification has one example a row"),
    ({"too_long": "split"}, choices(4), "examples of objective dpo cannot be split; use truncate or drop"),
    ({"train": "prefix", "objective": "mlm", "model": "bert"}, rounds(4), "which objective mlm cannot use"),
    ({"model": "bert"}, [{"text": "a", "label": "x"}] * 4, "labels: 1 found (x); classification needs at least 2"),
    (
        {"model": "bert", "labels": "a,b"},
        [{"text": "a", "label": 0}, {"text": "a", "label": 2}],
        "d.jsonl:2: label 2 is out of range: labels has 2, a, b. Correct it, or list all labels: labels.",
    ),
    (
        {"model": "bert", "labels": "sad,glad"},
        [{"text": "a", "label": "sad"}, {"text": "a", "label": "glda"}],
        'd.jsonl:2: label "glda" is not in labels (sad, glad); did you mean "glad"?',
    ),
    ({"model": "bert", "class_weights": "{hihg: 2}"}, moods(20), 'class_weights: "hihg" is not a label; did you mean'),
    ({"model": "bert", "class_weights": "{high: 2}", "balance_classes": True}, moods(20), "keep one"),
    ({"model": "bert"}, [{"text": "a" * 90, "label": i} for i in (0, 1)], "d.jsonl:1: 92 tokens, and a sequence may"),
    ({}, [{"prompt": "a", "chosen": "b", "rejected": "b"}], "d.jsonl:1: chosen and rejected are the same"),
    ({}, [{"prompt": "a" * 70, "chosen": "b", "rejected": "c"}], "d.jsonl:1: 72 tokens, and a sequence may have 64"),
    (
        {"too_long": "truncate"},
        [{"prompt": "a" * 70, "chosen": "b", "rejected": "c"}],
        "d.jsonl:1: no token of an answer is left to compare",
    ),
    (
        {"model": "bert", "objective": "embeddings", "batch_size": 1},
        shifts(4),
        "batch_size: 1 leaves nothing to compare an anchor with",
    ),
    (
        {"model": "bert", "objective": "embeddings"},
        [{"anchor": "a", "positive": ""}],
        "d.jsonl:1: a text is empty, so it has no embedding",
    ),
    ({"model": "bert", "objective": "mlm", "rope_scaling": "linear", "train": "full"}, rounds(4), "has no rotary"),
]


@pytest.mark.parametrize(("keys", "rows", "message"), WRONG)
def test_what_is_wrong_is_said_before_training(
    ready: Ready, tmp_path: Path, keys: dict[str, Any], rows: list[dict[str, Any]], message: str
) -> None:
    with pytest.raises(MergeError) as caught:
        ready(data=write_lines(tmp_path / "d.jsonl", rows), **keys)
    assert message in str(caught.value)
    assert not (tmp_path / "out.partial").exists()


def test_a_label_of_the_validation_file_that_training_lacks(ready: Ready, tmp_path: Path) -> None:
    held = write_lines(tmp_path / "held.jsonl", [*moods(3), {"text": "a", "label": "hgih"}])
    with pytest.raises(UsageError, match=r'held.jsonl:4: label "hgih" is not in the training data .*; did you mean'):
        ready(data="moods", model="bert", validation=held)


def test_a_teacher_with_another_vocabulary(ready: Ready, place: Path) -> None:
    with pytest.raises(UsageError, match=r"bert: its vocabulary is not the student's \(63 tokens and 79; \""):
        ready(data="words", objective="distillation", teacher=place / "bert")


def test_a_teacher_with_a_shorter_context(ready: Ready, tmp_path: Path) -> None:
    short = make_tiny_llama(tmp_path / "short", context=32)
    with pytest.raises(UsageError, match=r"max_length: 64 is more than the teacher's context of 32 tokens"):
        ready(data="words", objective="distillation", teacher=short)
    assert ready(data="words", objective="distillation", teacher=short, max_length=32).data.max_length == 32


def test_a_key_of_another_objective_and_scaling_with_an_adapter_stand_at_their_lines(tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    text = "model: m\ndata: d\nout: o\nobjective: dpo\nmask_rate: 0.2\nrope_scaling: yarn\n"
    file.write_text(text, encoding="utf-8")
    with pytest.raises(RecipeError) as caught:
        load_config(str(file))
    assert [str(problem).rpartition("c.yaml:")[2] for problem in caught.value.problems] == [
        '5: "mask_rate" belongs to objective: mlm; this is objective: dpo',
        '6: "rope_scaling" changes config.json, which an adapter does not have; use train: full, partial or bitfit',
    ]


def test_a_base_of_another_kind_is_not_given_a_random_head(run: Run, tmp_path: Path) -> None:
    from transformers import AutoModel

    AutoModel.from_pretrained(ready_copy(tmp_path)).save_pretrained(tmp_path / "headless")
    with pytest.raises(MergeError, match=r"headless: lacks lm_head.weight for LlamaForCausalLM"):
        run(data="words", model=tmp_path / "headless", max_steps=1)


def ready_copy(folder: Path) -> Path:
    """A model, and its tokenizer where the headless one will be."""
    import shutil

    make_tiny_llama(folder / "whole")
    (folder / "headless").mkdir()
    for file in (folder / "whole").glob("*token*"):
        shutil.copy(file, folder / "headless")
    return folder / "whole"
