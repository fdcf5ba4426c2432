"""Tokens a second of `merge finetune` with LoRA against a bare transformers Trainer with peft, and TRL's SFTTrainer
where it is installed, on the same rows.

    python benchmarks/finetune_speed.py MODEL [--data FILE.txt] [--steps N] [--rounds N] [--threads N]

All train the same adapter on the same examples in batches of the same shape, without validation and checkpoints, in
turns, each in a process of its own, from the end of the first step, which warms up, to the end of the last. Reported
are the median rates by the clock and by processor time, which says more on a busy machine, and peak memory.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
BATCH, RANK = 4, 8


def ours(model: str, data: str, steps: int, threads: int, length: int) -> dict[str, Any]:
    from finetune.config import load_config
    from finetune.prepare import prepare
    from finetune.train import finetune

    with tempfile.TemporaryDirectory() as folder:
        flags = {
            "model": model,
            "data": data,
            "out": f"{folder}/out",
            "max_length": length,
            "batch_size": BATCH,
            "max_steps": steps,
            "rank": RANK,
            "save_every": steps,
            "log_every": steps,
        }
        config = load_config(None, {name: [str(value)] for name, value in flags.items()})
        ends: list[tuple[float, float]] = []

        def watch(step: int, steps: int, logs: dict[str, float]) -> None:
            if not logs:
                ends.append(now())

        finetune(prepare(config), device="cpu", threads=threads, progress=watch)
        return between(ends)


def now() -> tuple[float, float]:
    return time.monotonic(), time.process_time()


def between(ends: list[tuple[float, float]]) -> dict[str, Any]:
    return {"seconds": ends[-1][0] - ends[0][0], "processor": ends[-1][1] - ends[0][1], "steps": len(ends) - 1}


def bare(model: str, data: str, steps: int, threads: int, length: int) -> dict[str, Any]:
    from transformers import Trainer, TrainingArguments

    def make(net: Any, ids: list[Any], settings: dict[str, Any], clock: Any) -> Any:
        args = TrainingArguments(**settings, remove_unused_columns=False)
        return Trainer(model=net, args=args, train_dataset=ids, data_collator=collate, callbacks=[clock])

    return others(make, model, data, steps, threads, length)


def trl(model: str, data: str, steps: int, threads: int, length: int) -> dict[str, Any]:
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    from merge.loading import load_tokenizer

    def make(net: Any, ids: list[Any], settings: dict[str, Any], clock: Any) -> Any:
        rows = Dataset.from_list([{"input_ids": one.tolist()} for one in ids])
        args = SFTConfig(**settings, max_length=length, bf16=False, gradient_checkpointing=False)
        tokenizer = load_tokenizer(model)
        return SFTTrainer(net, args=args, train_dataset=rows, processing_class=tokenizer, callbacks=[clock])

    return others(make, model, data, steps, threads, length)


def collate(batch: list[Any]) -> dict[str, Any]:
    import torch

    padded = torch.nn.utils.rnn.pad_sequence(batch, batch_first=True)
    mask = torch.nn.utils.rnn.pad_sequence([torch.ones_like(one) for one in batch], batch_first=True)
    return {"input_ids": padded, "attention_mask": mask, "labels": padded.masked_fill(mask == 0, -100)}


def others(make: Any, model: str, data: str, steps: int, threads: int, length: int) -> dict[str, Any]:
    """A trainer that make(net, rows, settings, clock) gives, on the rows that ours trains on."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import TrainerCallback, set_seed
    from transformers.utils import logging

    from finetune.config import load_config
    from finetune.prepare import prepare
    from merge.loading import CAUSAL, load_model

    logging.disable_progress_bar()
    torch.set_num_threads(threads)
    flags = {"model": model, "data": data, "out": "unused", "max_length": length}
    rows = prepare(load_config(None, {name: [str(value)] for name, value in flags.items()})).data.train
    ids = [torch.from_numpy(example.ids).long() for example in rows.examples]
    ends: list[tuple[float, float]] = []

    class Clock(TrainerCallback):
        def on_step_end(self, *_: Any, **__: Any) -> None:
            ends.append(now())

    set_seed(0)
    net = load_model(CAUSAL, model, dtype=torch.float32).network
    adapter = LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules="all-linear", task_type="CAUSAL_LM")
    net = get_peft_model(net, adapter)
    with tempfile.TemporaryDirectory() as folder:
        settings = {
            "output_dir": folder,
            "per_device_train_batch_size": BATCH,
            "max_steps": steps,
            "learning_rate": 2e-4,
            "lr_scheduler_type": "cosine",
            "warmup_steps": 0.03,
            "save_strategy": "no",
            "logging_steps": steps,
            "report_to": "none",
            "disable_tqdm": True,
            "seed": 0,
            "data_seed": 0,
            "use_cpu": True,
            "dataloader_pin_memory": False,
        }
        make(net, ids, settings, Clock()).train()
    return between(ends)


def one(kind: str, *settings: Any) -> None:
    import contextlib

    with contextlib.redirect_stdout(sys.stderr):
        result = {"ours": ours, "bare": bare, "trl": trl}[kind](*settings)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(json.dumps({**result, "peak MiB": round(peak)}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("model")
    parser.add_argument("--data", default=str(ROOT / "README.md"))
    parser.add_argument("--length", type=int, default=128, help="tokens of a sequence")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--kind", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.kind:
        one(args.kind, args.model, args.data, args.steps, args.threads, args.length)
        return
    found: dict[str, list[dict[str, Any]]] = {"bare": [], "ours": []}
    if importlib.util.find_spec("trl"):
        found["trl"] = []
    for turn in range(args.rounds):
        for kind in sorted(found, reverse=bool(turn % 2)):
            command = [sys.executable, __file__, args.model, "--kind", kind, "--data", args.data]
            command += ["--steps", str(args.steps), "--threads", str(args.threads), "--length", str(args.length)]
            environment = {**os.environ, "PYTHONPATH": str(ROOT)}
            text = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=environment).stdout
            found[kind].append(json.loads(text))
            print(kind, found[kind][-1], flush=True)
    kinds = [kind for kind in ("bare", "trl", "ours") if kind in found]
    print(f"| tokens/s | {' | '.join(kinds)} | ours / bare |\n|---|{'---:|' * (len(kinds) + 1)}")
    for clock in ("seconds", "processor"):
        rate = {
            kind: BATCH * args.length / statistics.median(run[clock] / run["steps"] for run in runs)
            for kind, runs in found.items()
        }
        shown = " | ".join(f"{rate[kind]:,.0f}" for kind in kinds)
        print(f"| by {clock} | {shown} | {rate['ours'] / rate['bare']:.3f} |")
    for kind, runs in found.items():
        print(f"peak MiB, {kind}: {statistics.median(run['peak MiB'] for run in runs):,.0f}")


if __name__ == "__main__":
    main()
