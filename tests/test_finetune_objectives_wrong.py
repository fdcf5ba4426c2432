"""Objectives with wrong data, models or keys: all is said before training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import objectives
import pytest
from objectives import Ready, Run
from tiny_llama import make_tiny_llama, words, write_lines
from toy_data import choices, moods, rounds, shifts

from finetune.config import load_config
from merge.errors import MergeError, RecipeError, UsageError

place, ready, run = objectives.place, objectives.ready, objectives.run  # fixtures


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
