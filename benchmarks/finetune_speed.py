"""Tokens a second of `merge finetune` with LoRA against a bare transformers Trainer with peft, on the same rows.

    python benchmarks/finetune_speed.py MODEL [--data FILE.txt] [--steps N] [--rounds N] [--threads N]

Both train the same adapter on the same examples in batches of the same shape, without validation and checkpoints, in
turns, each in a process of its own; reported are the median rates of the training loop, their ratio, and peak memory.
"""

from __future__ import annotations

import argparse
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
BATCH, LENGTH, RANK = 4, 128, 8


def ours(model: str, data: str, steps: int, threads: int) -> dict[str, Any]:
    from finetune.config import load_config
    from finetune.train import finetune, prepare

    with tempfile.TemporaryDirectory() as folder:
        flags = {
            **{"model": model, "data": data, "out": f"{folder}/out", "objective": "text", "max_length": LENGTH},
            **{"batch_size": BATCH, "max_steps": steps, "rank": RANK, "save_every": steps, "log_every": steps},
        }
        config = load_config(None, {name: [str(value)] for name, value in flags.items()})
        first: list[float] = []
        report = finetune(
            prepare(config), device="cpu", threads=threads, progress=lambda *_: first.append(time.monotonic())
        )
        # From the end of the first step, which warms up, to the end of the last, before the checkpoint.
        return {"seconds": first[steps - 1] - first[0] if len(first) >= steps else report.seconds}


def bare(model: str, data: str, steps: int, threads: int) -> dict[str, Any]:
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, Trainer, TrainerCallback, TrainingArguments, set_seed
    from transformers.utils import logging

    from finetune.config import load_config
    from finetune.train import prepare

    logging.disable_progress_bar()
    torch.set_num_threads(threads)
    flags = {"model": model, "data": data, "out": "unused", "objective": "text", "max_length": LENGTH}
    rows = prepare(load_config(None, {name: [str(value)] for name, value in flags.items()})).data.train
    ids = [torch.from_numpy(example.ids).long() for example in rows.examples]

    def collate(batch: list[Any]) -> dict[str, Any]:
        padded = torch.nn.utils.rnn.pad_sequence(batch, batch_first=True)
        mask = torch.nn.utils.rnn.pad_sequence([torch.ones_like(one) for one in batch], batch_first=True)
        return {"input_ids": padded, "attention_mask": mask, "labels": padded.masked_fill(mask == 0, -100)}

    class Clock(TrainerCallback):
        ends: list[float] = []

        def on_step_end(self, *_: Any, **__: Any) -> None:
            self.ends.append(time.monotonic())

    set_seed(0)
    net = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    settings = LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules="all-linear", task_type="CAUSAL_LM")
    net = get_peft_model(net, settings)
    with tempfile.TemporaryDirectory() as folder:
        args = TrainingArguments(
            folder, per_device_train_batch_size=BATCH, max_steps=steps, learning_rate=2e-4, lr_scheduler_type="cosine",
            warmup_steps=0.03, save_strategy="no", logging_steps=steps, report_to="none", disable_tqdm=True, seed=0,
            data_seed=0, use_cpu=True, remove_unused_columns=False, dataloader_pin_memory=False,
        )
        trainer = Trainer(model=net, args=args, train_dataset=ids, data_collator=collate, callbacks=[Clock()])
        trainer.train()
    return {"seconds": Clock.ends[-1] - Clock.ends[0]}


def one(kind: str, model: str, data: str, steps: int, threads: int) -> None:
    import contextlib

    with contextlib.redirect_stdout(sys.stderr):
        result = {"ours": ours, "bare": bare}[kind](model, data, steps, threads)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(json.dumps({**result, "peak MiB": round(peak)}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("model")
    parser.add_argument("--data", default=str(ROOT / "tests" / "tiny_llama.py"))
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--kind", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.kind:
        one(args.kind, args.model, args.data, args.steps, args.threads)
        return
    found: dict[str, list[dict[str, Any]]] = {"bare": [], "ours": []}
    for turn in range(args.rounds):
        for kind in sorted(found, reverse=bool(turn % 2)):
            command = [sys.executable, __file__, args.model, "--kind", kind, "--data", args.data]
            command += ["--steps", str(args.steps), "--threads", str(args.threads)]
            environment = {**os.environ, "PYTHONPATH": str(ROOT)}
            text = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=environment).stdout
            found[kind].append(json.loads(text))
            print(kind, found[kind][-1], flush=True)
    medians = {kind: statistics.median(run["seconds"] for run in runs) for kind, runs in found.items()}
    print(f"| tokens/s | {'bare Trainer':>12} | {'ours':>8} | ratio |")
    rate = {kind: BATCH * LENGTH * (args.steps - 1) / seconds for kind, seconds in medians.items()}
    print(f"|---|---:|---:|---:|\n| at most | {rate['bare']:,.0f} | {rate['ours']:,.0f} | {rate['ours'] / rate['bare']:.3f} |")
    for kind, runs in found.items():
        print(f"peak MiB, {kind}: {statistics.median(run['peak MiB'] for run in runs):,.0f}")


if __name__ == "__main__":
    main()
