"""Every verb and kind of work that writes, on models of a few kilobytes."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from bad_inputs.room import Room
from conftest import TOKENIZER, VOCABULARY, write_json
from random_adapters import write_adapter
from tiny_llama import make_tiny_llama, words, write_lines

from kills.campaign import Job

RUN = ("run", "r.yaml", "-o", "out", "--threads", "2", "--quiet", "--shard-size", "6kB")
LINEAR = (
    "merge_method: linear\nmodels: [{model: a, parameters: {weight: 0.3}}, {model: b, parameters: {weight: 0.7}}]\n"
)
TIES = """\
merge_method: ties
base_model: a
models: [{model: b, parameters: {weight: 0.6, density: [0.2, 0.8]}}]
parameters: {trim: PART}
"""
SLICES = """\
merge_method: passthrough
slices: [{sources: [{model: a, layer_range: [0, 2]}]}, {sources: [{model: b, layer_range: [1, 2]}]}]
"""
PIPELINE = """\
name: one
merge_method: linear
models: [{model: a, parameters: {weight: 0.5}}, {model: b, parameters: {weight: 0.5}}]
---
name: two
merge_method: ties
base_model: a
models: [{model: one}, {model: c}]
parameters: {weight: 0.5, density: 0.5, trim: model}
---
merge_method: slerp
base_model: two
models: [{model: b}]
parameters: {t: 0.3}
"""
ADAPTERS = (
    "merge_method: svd\nmodels: [{model: l, parameters: {weight: 1}}, {model: m}]\nparameters: {weight: 1, rank: 3}\n"
)
FOLDED = "merge_method: linear\nmodels: [{model: a+l}, {model: b+m}]\nparameters: {weight: 0.5}\n"
MIXTURE = """\
base_model: a
gate_mode: hidden
dtype: float32
experts: [{source_model: a, positive_prompts: [w1 w2]}, {source_model: b, positive_prompts: [w3 w4]}]
"""
SHAPES = {f"model.layers.{layer}.self_attn.q_proj": (8, 8) for layer in range(2)}
SHAPES |= {f"model.layers.{layer}.mlp.up_proj": (16, 8) for layer in range(2)}
FINETUNE = ("finetune", "f.yaml", "--device", "cpu", "--threads", "1", "--quiet")
TRAINING: Mapping[str, Any] = {
    "model": "t",
    "data": "train.jsonl",
    "validation": 0.2,
    "out": "out",
    "batch_size": 8,
    "max_steps": 4,
    "save_every": 2,
}
TASKS = """\
model: t
out: out
train: lora
strategy: [sequential, parallel]
batch_size: 16
max_steps: 2
validation: 0.2
tasks: {up: {data: train.jsonl}, again: {data: train.jsonl}}
merge: [{merge_method: linear, parameters: {weight: 0.5}}]
"""
MADE = [f"out/{name}" for name in ("sequential/1-up", "sequential/2-again", "parallel/up", "parallel/again")]
MADE += ["out/merged/linear", "out/results.json"]
JUDGED = ("--tasks", "choices.jsonl", "--batch-size", "1", "--quiet")


def models(recipe: str = LINEAR) -> Callable[[], None]:
    """a, its fine-tunes b and c, adapters l and m, a text, and the recipe."""

    def set_up() -> None:
        room = Room(Path.cwd(), contextlib.ExitStack())
        a, b = room.pair()
        for path in (a, b, room.model("c", seed=3, like=1)):
            _give_tokenizer(path, {f"w{i}": i for i in range(1, VOCABULARY)})
        for number, name in enumerate("lm"):
            write_adapter(Path(name), number, shapes=SHAPES, rank=2)
        room.recipe(recipe)
        random = np.random.default_rng(0)
        lines = [" ".join(f"w{i}" for i in random.integers(1, VOCABULARY, 9)) for _ in range(4)]
        Path("text.txt").write_text("\n".join(lines), encoding="utf-8")

    return set_up


def vocabularies(recipe: str = "") -> Callable[[], None]:
    """The same; b has some words of its own."""

    def set_up() -> None:
        models(recipe)()
        _give_tokenizer(Path("b"), {f"{'v' if i % 4 == 0 else 'w'}{i}": i for i in range(1, VOCABULARY)})

    return set_up


def _give_tokenizer(path: Path, vocabulary: Mapping[str, int]) -> None:
    model = {**TOKENIZER["model"], "vocab": {"<unk>": 0, **vocabulary}}
    write_json(path / "tokenizer.json", {**TOKENIZER, "model": model})
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "unk_token": "<unk>", "eos_token": "<unk>"}
    write_json(path / "tokenizer_config.json", settings)


def judged() -> None:
    """a, b, and questions with choices."""
    models()()
    rows = [{"question": f"w{i} w{i + 1}", "choices": ["w1 w2", f"w{i}"], "answer": i % 2} for i in range(1, 7)]
    write_lines(Path("choices.jsonl"), rows)


def training(**keys: Any) -> Callable[[], None]:
    def set_up() -> None:
        make_tiny_llama(Path("t"))
        write_lines(Path("train.jsonl"), words(40))
        Path("f.yaml").write_text(json.dumps({**TRAINING, **keys}), encoding="utf-8")
        Path("tasks.yaml").write_text(TASKS, encoding="utf-8")

    return set_up


def run(name: str, recipe: str, more: Sequence[str] = (), **facts: Any) -> Job:
    return Job(f"run: {name}", models(recipe), (*RUN, *more), **facts)


def verb(name: str, text: str, **facts: Any) -> Job:
    return Job(name, facts.pop("set_up", models()), text.split(), **facts)


OLD = ("convert", "c", "-o", "out", "--quiet")
JOBS = {
    job.name: job
    for job in (
        run("copies", "merge_method: passthrough\nmodels: [{model: a}]\n"),
        run("element by element", LINEAR),
        run("sparse", TIES.replace("PART", "tensor")),
        run("a threshold of the model", TIES.replace("PART", "model").replace("[0.2, 0.8]", "0.4")),
        run("matrices", "merge_method: tsv\nbase_model: a\nmodels: [{model: b}, {model: c}]\n"),
        run("align", LINEAR + "align: permutation\n"),
        run("slices", SLICES),
        run("adapters folded", FOLDED),
        run("adapters", ADAPTERS),
        run("mixture", MIXTURE),
        Job("run: union", vocabularies(LINEAR + "tokenizer_source: union\n"), RUN),
        run("pipeline", PIPELINE),
        run("pipeline, all stages kept", PIPELINE, ("--keep-stages",)),
        run("in place of another", LINEAR, ("--force",), before=[OLD]),
        run("in place of another, by two names", LINEAR, ("--force",), before=[OLD], exchange=False),
        run("pipeline in place of another", PIPELINE, ("--force",), before=[OLD]),
        verb("convert", "convert a -o out --dtype bfloat16 --quiet"),
        verb("convert in place", "convert a -o out --dtype bfloat16 --quiet --force", before=[OLD]),
        verb("quantize", "quantize t -o out --to fp8 --no-perplexity --quiet", set_up=training()),
        verb("lora fold", "lora fold a l -o out --quiet"),
        verb("lora extract", "lora extract b --base a -o out --rank 2 --save-modules --quiet"),
        verb(
            "lora extract in place",
            "lora extract b --base a -o out --rank 2 --quiet --force",
            before=[["lora", "extract", "c", "--base", "a", "-o", "out", "--rank", "2", "--quiet"]],
        ),
        verb("transplant", "transplant a b -o out --k 2 --quiet", set_up=vocabularies()),
        verb("statistics: gram", "statistics a --data text.txt -o out --quiet"),
        verb("statistics: fisher", "statistics a --data text.txt -o out --kind both --quiet"),
        verb(
            "statistics in place",
            "statistics a --data text.txt -o out --quiet --force",
            before=[["statistics", "b", "--data", "text.txt", "-o", "out", "--quiet"]],
        ),
        Job("eval", judged, ("eval", "a", "b", "-o", "s.json", *JUDGED), ["s.json"]),
        Job("eval of a recipe", judged, ("eval", "r.yaml", "-o", "s.json", *JUDGED), ["s.json"]),
        Job(
            "eval of a recipe, kept",
            judged,
            ("eval", "r.yaml", "--keep", "kept", "-o", "s.json", *JUDGED),
            ["kept/r", "s.json"],
        ),
        Job(
            "compare: page",
            judged,
            ("compare", "a", "b", "--html", "p.html", "-o", "s.json", *JUDGED),
            ["s.json", "p.html"],
        ),
        Job("compare: card", judged, ("compare", "a", "b", "--card", "b", *JUDGED), ["b/README.md"]),
        Job("perplexity of a recipe", judged, ("perplexity", "r.yaml", "--data", "text.txt", "--quiet"), []),
        Job("soup", judged, ("soup", "a", "b", "c", "-o", "out", *JUDGED)),
        Job("finetune: lora", training(train="lora", rank=2), FINETUNE),
        Job("finetune: full", training(train="full"), FINETUNE),
        Job("finetune: best", training(train="full", keep_best=True), FINETUNE),
        Job("finetune: bottleneck", training(train="bottleneck"), FINETUNE),
        Job(
            "finetune in place",
            training(train="lora", rank=2),
            (*FINETUNE, "--force", "--seed", "3"),
            before=[FINETUNE],
        ),
        Job("finetune: tasks", training(), ("finetune", "tasks.yaml", *FINETUNE[2:]), MADE),
    )
}
