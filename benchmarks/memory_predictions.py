"""Predicted against measured peak memory of ten real runs of one model, each in a process of its own (Linux).

    python benchmarks/memory_predictions.py MODEL

Measured: the largest resident set during the second step of `merge finetune`, or one pass over a prompt, less what the
process held with all libraries imported and before the model was loaded. Predicted: what `merge memory` says of the
same config, which is tensors.

glibc keeps what is freed in its heaps: by default blocks of up to 32 MiB, once some of that size have been freed. The
column "glibc default" has that on top, and depends on the order of allocations. With a fixed threshold (the variables
below) freed tensors go back to the system, and the resident set is what tensors take.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

FULL, LORA = {"train": "full"}, {"train": "lora", "rank": 8}
RUNS: dict[str, dict[str, Any]] = {
    "inference, 1 x 512": {"batch": 1, "context": 512},
    "inference, 4 x 1024": {"batch": 4, "context": 1024},
    "full, AdamW, 2 x 256": FULL | {"batch_size": 2},
    "full, AdamW, 2 x 256, checkpointing": FULL | {"batch_size": 2, "gradient_checkpointing": True},
    "full, SGD, 4 x 256": FULL | {"batch_size": 4, "optimizer": "sgd"},
    "full, Adafactor, 2 x 256, accumulation": FULL
    | {"batch_size": 2, "optimizer": "adafactor", "gradient_accumulation": 2},
    "LoRA r 8, 4 x 256": LORA | {"batch_size": 4},
    "LoRA r 8, 4 x 256, checkpointing": LORA | {"batch_size": 4, "gradient_checkpointing": True},
    "LoRA r 64 on q and v, 2 x 256": LORA | {"batch_size": 2, "rank": 64, "target_modules": "q_proj,v_proj"},
    "QLoRA r 8, 2 x 256": {"train": "qlora", "rank": 8, "batch_size": 2},
}
LENGTH, STEPS = 256, 2
LICENCE = Path(__file__).resolve().parent.parent / "LICENSE"


GIVES_BACK = {"MALLOC_MMAP_THRESHOLD_": "131072", "MALLOC_TRIM_THRESHOLD_": "131072"}


def resident(key: str) -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(key))
    return int(line.split()[1]) * 1024


def measure(model: str, run: dict[str, Any]) -> int:
    """Bytes over the baseline; in this process."""
    import torch
    from transformers import LlamaForCausalLM  # noqa: F401  # imported before the baseline

    torch.manual_seed(0)
    warm = torch.nn.Linear(64, 64)
    torch.optim.AdamW(warm.parameters())
    warm(torch.zeros(64, 64)).sum().backward()  # the libraries' threads and workspaces
    return infer(model, run) if "train" not in run else train(model, run)


def infer(model: str, run: dict[str, Any]) -> int:
    import torch

    from merge.loading import CAUSAL, load_model

    baseline = resident("VmRSS")
    loaded = load_model(CAUSAL, model, dtype=torch.float32).network
    Path("/proc/self/clear_refs").write_text("5")  # the peak of loading, with the file's pages, is not asked for
    tokens = torch.randint(0, 1000, (run["batch"], run["context"]))
    with torch.no_grad():
        loaded(input_ids=tokens, use_cache=True, logits_to_keep=1)
    return resident("VmHWM") - baseline


def train(model: str, run: dict[str, Any]) -> int:
    """`merge finetune` itself. The peak of loading and of the first step, which warms up, is not asked for."""
    from peft import tuners  # noqa: F401

    from finetune.prepare import prepare
    from finetune.train import finetune

    peaks = []
    with tempfile.TemporaryDirectory() as folder:
        text = Path(folder, "text.txt")
        text.write_text(LICENCE.read_text(encoding="utf-8"), encoding="utf-8")
        prepared = prepare(config_of(model, run, folder))
        baseline = resident("VmRSS")

        def watch(step: int, steps: int, logs: dict[str, float]) -> None:
            if step == STEPS and not peaks:
                peaks.append(resident("VmHWM") - baseline)
            Path("/proc/self/clear_refs").write_text("5")

        finetune(prepared, device="cpu", progress=watch)
    return peaks[0]


def config_of(model: str, run: dict[str, Any], folder: str) -> Any:
    from finetune.config import load_config

    flags = {
        "model": model,
        "data": f"{folder}/text.txt",
        "out": f"{folder}/out",
        "max_length": LENGTH,
        "max_steps": STEPS,
        "save_every": STEPS,
    } | run
    return load_config(None, {name: [str(value)] for name, value in flags.items()})


def predict(model: str, run: dict[str, Any]) -> int:
    import dataclasses

    from merge.cli.memory import request_of
    from merge.tools.memory import Request, estimate

    if "train" not in run:
        return estimate(model, Request(task="inference", dtype="float32", device="cpu", **run)).total
    request = request_of(config_of(model, run, "unused"))
    return estimate(model, dataclasses.replace(request, device="cpu")).total


def main() -> None:
    model = sys.argv[1]
    if len(sys.argv) > 2:
        print(measure(model, json.loads(sys.argv[2])))
        return
    print(
        "| run | predicted, MB | measured, MB | predicted / measured | glibc default, MB |\n|---|---:|---:|---:|---:|"
    )
    for name, run in RUNS.items():
        measured, default = measure_apart(model, run, GIVES_BACK), measure_apart(model, run, {})
        predicted = predict(model, run)
        row = f"{predicted / 1e6:,.0f} | {measured / 1e6:,.0f} | {predicted / measured:.3f} | {default / 1e6:,.0f}"
        print(f"| {name} | {row} |", flush=True)


def measure_apart(model: str, run: dict[str, Any], env: dict[str, str]) -> int:
    command = [sys.executable, __file__, model, json.dumps(run)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=os.environ | env)
    return int(done.stdout.split()[-1])


if __name__ == "__main__":
    main()
