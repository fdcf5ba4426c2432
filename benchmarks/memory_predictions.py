"""Predicted against measured peak memory of five real runs of one model, each in a process of its own (Linux).

    python benchmarks/memory_predictions.py MODEL

Measured: the largest resident set during two training steps, or one pass over a prompt, less what the process held with
all libraries imported and before the model was loaded. Predicted: what `merge memory` says, which is tensors.

glibc keeps what is freed in its heaps: by default blocks of up to 32 MiB, once some of that size have been freed. The
column "glibc default" has that on top, and depends on the order of allocations. With a fixed threshold (the variables
below) freed tensors go back to the system, and the resident set is what tensors take.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

RUNS: dict[str, dict[str, Any]] = {
    "inference, 1 x 512": {"task": "inference", "batch": 1, "context": 512},
    "inference, 4 x 1024": {"task": "inference", "batch": 4, "context": 1024},
    "full, AdamW, 2 x 256": {"task": "full", "batch": 2, "context": 256},
    "LoRA r 8, 4 x 256": {"task": "lora", "batch": 4, "context": 256},
    "LoRA r 8, 4 x 256, checkpointing": {"task": "lora", "batch": 4, "context": 256, "checkpointing": True},
}


GIVES_BACK = {"MALLOC_MMAP_THRESHOLD_": "131072", "MALLOC_TRIM_THRESHOLD_": "131072"}


def resident(key: str) -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(key))
    return int(line.split()[1]) * 1024


def measure(model: str, run: dict[str, Any]) -> int:
    """Bytes over the baseline; in this process."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaForCausalLM  # noqa: F401  # imported before the baseline

    from merge.loading import CAUSAL, load_model

    torch.manual_seed(0)
    warm = torch.nn.Linear(64, 64)
    torch.optim.AdamW(warm.parameters())
    warm(torch.zeros(64, 64)).sum().backward()  # the libraries' threads and workspaces
    baseline = resident("VmRSS")
    loaded = load_model(CAUSAL, model, dtype=torch.float32).network
    Path("/proc/self/clear_refs").write_text("5")  # the peak of loading, with the file's pages, is not asked for
    tokens = torch.randint(0, 1000, (run["batch"], run["context"]))
    if run["task"] == "inference":
        with torch.no_grad():
            loaded(input_ids=tokens, use_cache=True, logits_to_keep=1)
        return resident("VmHWM") - baseline
    if run.get("checkpointing"):
        loaded.gradient_checkpointing_enable({"use_reentrant": False})
        loaded.enable_input_require_grads()
    if run["task"] == "lora":
        config = LoraConfig(r=8, target_modules="all-linear", task_type="CAUSAL_LM")
        loaded = get_peft_model(loaded, config)
    optimizer = torch.optim.AdamW([p for p in loaded.parameters() if p.requires_grad], lr=1e-4)
    loaded.train()
    for _ in range(2):
        loaded(input_ids=tokens, labels=tokens).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return resident("VmHWM") - baseline


def predict(model: str, run: dict[str, Any]) -> int:
    from finetune.memory import Request, estimate

    return estimate(model, Request(dtype="float32", device="cpu", optimizer="adamw", **run)).total


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
