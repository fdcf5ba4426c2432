"""Every way of training and every objective on tiny models: what held-out figures were before and are after.

    python benchmarks/finetune_table.py [--only NAME]... [--threads N]

Models of two layers are made on the spot, as are the data (tests/toy_data.py). Prints two tables in Markdown. What is
trained: a model that has learnt to write a word backwards learns to write it forwards. Objectives: each from random
weights.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

USUAL = {"validation": 0.2, "batch_size": 16, "epochs": 6, "learning_rate": 1e-2, "log_every": 10}
FULL = {"train": "full", "learning_rate": 3e-3}

KINDS: dict[str, dict[str, Any]] = {
    "full": FULL,
    "partial, last layer": {"train": "partial", "train_last": 1, "learning_rate": 3e-3},
    "partial, without embeddings": {"train": "partial", "freeze": "embed_tokens", "learning_rate": 3e-3},
    "partial, by pattern": {"train": "partial", "train_only": "mlp", "learning_rate": 3e-3},
    "BitFit": {"train": "bitfit", "model": "biased backwards"},
    "LoRA": {"train": "lora"},
    "LoRA, ranks by pattern": {"train": "lora", "rank_pattern": "{q_proj: 4, mlp.down_proj: 32}"},
    "rsLoRA": {"train": "lora", "rslora": True, "learning_rate": 3e-3},
    "DoRA": {"train": "lora", "dora": True},
    "QLoRA": {"train": "qlora"},
    "IA3": {"train": "ia3", "learning_rate": 0.1},
    "prompt tuning": {"train": "prompt", "learning_rate": 0.05},
    "prefix tuning": {"train": "prefix", "learning_rate": 0.05},
    "P-tuning": {"train": "ptuning"},
    "bottleneck adapters": {"train": "bottleneck"},
}
MARKS = "<|fim_prefix|>,<|fim_suffix|>,<|fim_middle|>"
OBJECTIVES: dict[str, dict[str, Any]] = {
    "supervised": {"data": "words", **FULL},
    "text": {"data": "rounds", **FULL},
    "infilling": {
        "data": "rounds",
        "objective": "infilling",
        "new_tokens": MARKS,
        "infilling_rate": 0.9,
        "epochs": 10,
        **FULL,
    },
    "mlm": {"model": "bert", "data": "rounds", "objective": "mlm", "mask_copies": 4, **FULL},
    "classification, LoRA": {"model": "bert", "data": "moods"},
    "classification, Llama": {"data": "moods"},
    "dpo, LoRA": {"data": "choices"},
    "dpo, full": {"data": "choices", "train": "full", "learning_rate": 1e-3},
    "kto, LoRA": {"data": "judged"},
    "distillation": {"data": "words", "objective": "distillation", "teacher": "teacher", **FULL},
    "embeddings": {"model": "bert", "data": "shifts", "objective": "embeddings", "epochs": 15, **FULL},
    "text, twice the context (yarn)": {"data": "rounds", "rope_scaling": "yarn", **FULL},
}
SHOWN = {
    "reward_accuracy": "reward accuracy",
    "reward_margin": "reward margin",
    "teacher_kl": "KL to the teacher",
    "accuracy": "accuracy",
    "macro_f1": "macro F1",
    "matthews": "Matthews",
}


def make(folder: Path) -> None:
    from tiny_bert import make_tiny_bert
    from tiny_llama import make_tiny_llama, words, write_lines
    from toy_data import choices, judged, moods, rounds, shifts

    make_tiny_llama(folder / "llama")
    make_tiny_llama(folder / "biased", bias=True)
    make_tiny_bert(folder / "bert")
    for name, rows in {"words": words, "rounds": rounds, "moods": moods, "choices": choices, "judged": judged}.items():
        write_lines(folder / f"{name}.jsonl", rows(400))
    write_lines(folder / "shifts.jsonl", shifts(1000))
    backwards = [{**row, "completion": row["completion"][::-1]} for row in words(400, seed=1)]
    write_lines(folder / "backwards.jsonl", backwards)


def run(folder: Path, name: str, settings: dict[str, Any], threads: int) -> tuple[Any, float]:
    from finetune.config import load_config
    from finetune.prepare import prepare
    from finetune.train import finetune

    given = {"model": "llama", "data": "words", **USUAL, **settings, "out": f"out {name}"}
    for key in ("model", "teacher", "out"):
        if key in given:
            given[key] = folder / given[key]
    given["data"] = folder / f"{given['data']}.jsonl"
    flags = {key: [str(value).lower() if isinstance(value, bool) else str(value)] for key, value in given.items()}
    started = time.monotonic()
    report = finetune(prepare(load_config(None, flags)), device="cpu", threads=threads, force=True)
    return report, time.monotonic() - started


def base(folder: Path, name: str, threads: int, **settings: Any) -> None:
    """Trains a model that others start from."""
    run(folder, name, {**FULL, "epochs": 12, **settings}, threads)
    (folder / f"out {name}").rename(folder / name)


def kinds(folder: Path, wanted: list[str], threads: int) -> None:
    if not wanted or set(wanted) & set(KINDS):
        base(folder, "llama backwards", threads, data="backwards")
        base(folder, "biased backwards", threads, data="backwards", model="biased")
    print(
        "| what is trained | parameters | share | loss before | loss after | seconds |\n|---|---:|---:|---:|---:|---:|"
    )
    for name, settings in KINDS.items():
        if wanted and name not in wanted:
            continue
        report, seconds = run(folder, name, {"model": "llama backwards", **settings}, threads)
        share = report.trained_parameters / report.parameters
        before, after = report.losses["validation_before"], report.losses["validation"]
        print(
            f"| {name} | {report.trained_parameters:,} | {share:.1%} | {before:.3f} | {after:.3f} | {seconds:.1f} |",
            flush=True,
        )


def objectives(folder: Path, wanted: list[str], threads: int) -> None:
    if not wanted or "distillation" in wanted:
        base(folder, "teacher", threads)
    print("\n| objective | loss before | loss after | before -> after | seconds |\n|---|---:|---:|---|---:|")
    for name, settings in OBJECTIVES.items():
        if wanted and name not in wanted:
            continue
        report, seconds = run(folder, name, settings, threads)
        before, after = report.losses["validation_before"], report.losses["validation"]
        found = [f"{SHOWN[key]} {a:.2f} -> {b:.2f}" for key, (a, b) in report.metrics.items() if key in SHOWN]
        print(f"| {name} | {before:.3f} | {after:.3f} | {', '.join(found)} | {seconds:.1f} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--only", action="append", default=[], metavar="NAME", help="a row's name")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    from transformers.utils import logging

    logging.disable_progress_bar()
    with tempfile.TemporaryDirectory() as text:
        folder = Path(text)
        make(folder)
        kinds(folder, args.only, args.threads)
        objectives(folder, args.only, args.threads)


if __name__ == "__main__":
    main()
