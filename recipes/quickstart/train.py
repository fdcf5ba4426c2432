"""Trains the quickstart family: a base and three experts, about 1 M parameters each, for `make demo` and the recipes.

    python recipes/quickstart/train.py --out DIR            # DIR/base, DIR/reverse, DIR/sort, DIR/add, DIR/data

It takes about 4 minutes of one core, and is not part of the demo: the trained family is kept with the code. Seeds are
fixed and one thread is used, so one machine repeats its own bytes; another CPU or torch release may differ in the last
bits, and training amplifies that. README.md says where the family that is kept differs from what this makes today.

The base practises three general skills (copy, shift, rotate) and, of the three scored ones, those of which it knows
less than half: a mixture that changes with what the model knows, which no config can say, so it has a loop of its own
here. What is kept is the running average of its weights, at the first check from KEEP_FROM on that is CLOSE_ENOUGH to
one half on all three, else at the nearest. Each expert is `merge finetune` of reverse.yaml, sort.yaml or add.yaml, on
data that data.py writes: its own skill with general practice mixed in, nothing of the other experts' skills. Everything
is drawn from the training side of the split in eval/exact_match.py, the checks too; README.md says what was chosen by
hand, and on what.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import math
import random
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast
from transformers.utils import logging

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parents[1]), str(HERE)]  # a script of the repository, not of the package

from data import GENERAL as GENERAL_SKILLS  # noqa: E402
from data import build_model, build_tokenizer, write_data  # noqa: E402

from eval.exact_match import SKILLS, questions  # noqa: E402
from finetune.keys import Source  # noqa: E402

SEED = 0
ROWS = 64  # a batch
TARGET = 0.5  # what the base should know of each scored skill
CLOSE_ENOUGH = 0.115
# Steps. A base kept at step 460 gave experts nearly as good, but their best merge (61.5 %) was below the best of them
# (62.7 %; 200 prompts a skill).
KEEP_FROM = 700
BASE_STEPS, BASE_RATE, CHECK_EVERY, CHECK_ITEMS = 900, 1.5e-3, 20, 100
GENERAL_SHARE = 0.2
IGNORED = -100  # label of what is not the answer

GENERAL = {skill.name: skill for skill in GENERAL_SKILLS}


@dataclass(frozen=True, slots=True)
class Batch:
    """ids, labels: (rows, positions) int64; labels are IGNORED except on the answer and its end mark."""

    ids: torch.Tensor
    labels: torch.Tensor


def draw_batch(tokenizer: PreTrainedTokenizerFast, mix: Mapping[str, float], rows: int, rng: random.Random) -> Batch:
    """rows examples, each of a skill drawn by its weight in mix, from the training side of the split."""
    prompts, answers = [], []
    for name in rng.choices(list(mix), list(mix.values()), k=rows):
        skill = SKILLS.get(name) or GENERAL[name]
        (question,) = questions(skill, 1, rng, test=False)
        prompts.append(tokenizer.encode(skill.prompt(question)))
        answers.append([*tokenizer.encode(skill.solve(question)), tokenizer.eos_token_id])
    longest = max(len(prompt) + len(answer) for prompt, answer in zip(prompts, answers, strict=True))
    ids = torch.full((rows, longest), tokenizer.pad_token_id)
    labels = torch.full((rows, longest), IGNORED)
    for row, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
        end = len(prompt) + len(answer)
        ids[row, :end] = torch.tensor(prompt + answer)
        labels[row, len(prompt) : end] = torch.tensor(answer)
    return Batch(ids, labels)


def step_on(model: LlamaForCausalLM, optimizer: torch.optim.Optimizer, rate: float, batch: Batch) -> None:
    """One optimiser step; padding is on the right, so causal attention needs no mask."""
    for group in optimizer.param_groups:
        group["lr"] = rate
    logits = model(input_ids=batch.ids).logits[:, :-1]
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch.labels[:, 1:].flatten(), ignore_index=IGNORED)
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()


def cosine(place: float, floor: float) -> float:
    """From 1 at place 0 to floor at place 1."""
    return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * place))


@torch.no_grad()
def share_right(model: LlamaForCausalLM, batch: Batch) -> float:
    """Teacher-forced, which for whole answers is greedy exact match."""
    best = model(input_ids=batch.ids).logits[:, :-1].argmax(-1)
    wanted = batch.labels[:, 1:]
    return ((best == wanted) | (wanted == IGNORED)).all(1).float().mean().item()


def base_mix(known: Mapping[str, float]) -> dict[str, float]:
    """General practice, and the scored skills by what is missing to TARGET; only general practice if nothing is."""
    missing = {name: max(0.005, TARGET - share) for name, share in known.items()}
    general = 1.0 if min(known.values()) >= TARGET else GENERAL_SHARE
    scale = (1 - general) / sum(missing.values())
    return {name: m * scale for name, m in missing.items()} | dict.fromkeys(GENERAL, general / len(GENERAL))


def train_base(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """The averaged model, at the check where the skill farthest from TARGET was nearest to it."""
    model = build_model(tokenizer)
    average = copy.deepcopy(model)
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.98), weight_decay=0.01)
    rng, check_rng = random.Random(SEED + 1), random.Random(SEED + 2)
    checks = {name: draw_batch(tokenizer, {name: 1.0}, CHECK_ITEMS, check_rng) for name in SKILLS}
    known = dict.fromkeys(SKILLS, 0.0)
    kept, nearest = copy.deepcopy(average), math.inf
    for step in range(BASE_STEPS):
        rate = BASE_RATE * min(1.0, (step + 1) / 50) * cosine(step / BASE_STEPS, floor=0.3)
        step_on(model, optimizer, rate, draw_batch(tokenizer, base_mix(known), ROWS, rng))
        with torch.no_grad():
            for mean, new in zip(average.parameters(), model.parameters(), strict=True):
                mean.lerp_(new, 1 - min(0.97, step / (step + 10)))
        if (step + 1) % CHECK_EVERY == 0:
            known = {name: share_right(average, batch) for name, batch in checks.items()}
            far = max(abs(share - TARGET) for share in known.values())
            if far < nearest and step + 1 >= KEEP_FROM:
                kept, nearest = copy.deepcopy(average), far
                print(f"base step {step + 1}:", *(f"{name} {share:.2f}" for name, share in known.items()), flush=True)
            if nearest <= CLOSE_ENOUGH:
                break
    return kept


def train_expert(name: str, folder: Path) -> None:
    """folder/NAME from folder/base, by the config beside this file, on folder/data."""
    from finetune.config import load_config
    from finetune.train import finetune, prepare

    general, own = folder / "data" / "general.jsonl", folder / "data" / f"{name}.jsonl"
    config = load_config(
        str(HERE / f"{name}.yaml"),
        {"model": [str(folder / "base")], "out": [str(folder / name)]},
    )
    weights = [source.weight for source in config.data]
    data = (Source(str(own), weight=weights[0]), Source(str(general), weight=weights[1]))
    held_out = (Source(str(folder / "data" / f"{name}-held-out.jsonl")),)
    finetune(prepare(dataclasses.replace(config, data=data, validation=held_out)), device="cpu", threads=1, force=True)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Train the quickstart family.")
    parser.add_argument("--out", type=Path, required=True, help="folder of base/, reverse/, sort/, add/ and data/")
    out = parser.parse_args(arguments).out
    logging.disable_progress_bar()
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    torch.manual_seed(SEED)
    started = time.monotonic()
    tokenizer = build_tokenizer()
    base = train_base(tokenizer).to(torch.bfloat16)
    base.save_pretrained(out / "base")
    tokenizer.save_pretrained(out / "base")
    write_data(out / "data", SEED)
    for name in SKILLS:
        train_expert(name, out)
        print(f"{name} trained, {time.monotonic() - started:.0f} s", flush=True)
    print(f"4 models of {base.num_parameters():,} parameters in {out}, {time.monotonic() - started:.0f} s")


if __name__ == "__main__":
    main()
