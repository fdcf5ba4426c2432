"""Exact match on the quickstart skills: draws questions and measures the share a model answers exactly.

A prompt is `skill:question=`, the model writes the answer and stops. Prompts are split by a hash of their text, so that
no held-out prompt is ever trained on, whatever the seeds are (recipes/quickstart/data.py draws from the other side).
Decoding is greedy; prompts of one length make one batch, so nothing is padded and nothing is masked.
"""

from __future__ import annotations

import hashlib
import math
import os
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from string import ascii_lowercase
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

HELD_OUT_SHARE = 0.1
MAX_ANSWER = 10  # tokens, including the end mark
MAX_ITEMS = 700  # there are about 810 held-out sums, and the prompts of a test are all different


@dataclass(frozen=True, slots=True)
class Skill:
    """One exactly checkable skill: how questions are drawn, and the one right answer to each."""

    name: str
    summary: str
    draw: Callable[[random.Random], str]
    solve: Callable[[str], str]

    def prompt(self, question: str) -> str:
        return f"{self.name}:{question}="

    def check(self, question: str, completion: str) -> bool:
        """True only if every character is right and nothing follows."""
        return completion == self.solve(question)


@dataclass(frozen=True, slots=True)
class Score:
    """How many of the items were answered correctly."""

    correct: int
    items: int

    @property
    def share(self) -> float:
        return self.correct / self.items

    @property
    def standard_error(self) -> float:
        """Of the share, binomial; add-one smoothed, since 0 of n and n of n are not certain either."""
        p = (self.correct + 1) / (self.items + 2)
        return math.sqrt(p * (1 - p) / self.items)


def average(scores: Mapping[str, Score]) -> float:
    """Mean of the skills' shares, each skill counting the same."""
    return sum(one.share for one in scores.values()) / len(scores)


def average_error(scores: Mapping[str, Score]) -> float:
    """Standard error of average(); the skills' prompts are drawn independently."""
    return math.sqrt(sum(one.standard_error**2 for one in scores.values())) / len(scores)


def draw_word(rng: random.Random) -> str:
    return "".join(rng.choices(ascii_lowercase, k=rng.randint(4, 8)))


def draw_sum(rng: random.Random) -> str:
    return f"{rng.randint(10, 99)}+{rng.randint(10, 99)}"


SKILLS: Mapping[str, Skill] = {
    skill.name: skill
    for skill in (
        Skill("reverse", "write a word of 4 to 8 random letters backwards", draw_word, lambda word: word[::-1]),
        Skill("sort", "put its letters in alphabetical order", draw_word, lambda word: "".join(sorted(word))),
        Skill("add", "add two numbers of two digits", draw_sum, lambda both: str(sum(map(int, both.split("+"))))),
    )
}


def held_out(prompt: str) -> bool:
    """The side of the split that a prompt is on, from its text alone."""
    digest = hashlib.sha256(prompt.encode()).digest()
    return int.from_bytes(digest[:8], "big") < HELD_OUT_SHARE * 2**64


def questions(skill: Skill, n_items: int, rng: random.Random, *, test: bool) -> list[str]:
    """n_items questions from one side of the split; on the test side all different."""
    drawn: list[str] = []
    seen: set[str] = set()
    while len(drawn) < n_items:
        question = skill.draw(rng)
        if held_out(skill.prompt(question)) == test and question not in seen:
            drawn.append(question)
            if test:
                seen.add(question)
    return drawn


def complete(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str]) -> list[str]:
    """Greedy completions of the prompts, up to the end mark (not included)."""
    import torch

    by_length: dict[int, list[int]] = {}
    encoded = tokenizer(list(prompts))["input_ids"]
    for place, ids in enumerate(encoded):
        by_length.setdefault(len(ids), []).append(place)
    completions = [""] * len(prompts)
    for length, places in by_length.items():
        batch = torch.tensor([encoded[place] for place in places])
        written = model.generate(
            batch,
            attention_mask=torch.ones_like(batch),
            do_sample=False,
            max_new_tokens=MAX_ANSWER,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
        # Cut at the end mark by hand: skipping special tokens would also forgive one in the middle of an answer.
        texts = tokenizer.batch_decode(written[:, length:], skip_special_tokens=False)
        for place, text in zip(places, texts, strict=True):
            completions[place] = text.split(tokenizer.eos_token)[0]
    return completions


def score_model(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, skills: Sequence[str], n_items: int, seed: int = 0
) -> dict[str, Score]:
    """Like score(), for a model in memory."""
    import torch

    # Matrices this small are not worth sharing: on a busy machine two threads that wait for each other took 15 times
    # as long as one (measured: 9 s and 0.6 s a model).
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        scores = {}
        for name in skills:
            skill = SKILLS[name]
            asked = questions(skill, n_items, random.Random(f"{seed}:{name}"), test=True)
            written = complete(model, tokenizer, [skill.prompt(question) for question in asked])
            correct = sum(skill.check(question, text) for question, text in zip(asked, written, strict=True))
            scores[name] = Score(correct, n_items)
    finally:
        torch.set_num_threads(threads)
    return scores


def score(
    model_dir: str | os.PathLike[str], skills: Sequence[str] = tuple(SKILLS), n_items: int = 500, seed: int = 0
) -> dict[str, Score]:
    """Held-out exact match of a model directory.

    Args:
        model_dir: a Hugging Face directory with its tokenizer; nothing is fetched.
        skills: names in SKILLS.
        n_items: prompts a skill, all different (at most MAX_ITEMS).
        seed: draws the prompts; equal seeds ask every model the same.

    Returns:
        A Score for each skill, in the order given.

    Raises:
        FileNotFoundError: model_dir is not a directory with a config.json.
    """
    if not (Path(model_dir) / "config.json").is_file():
        raise FileNotFoundError(f"{os.fspath(model_dir)}: not a model directory, no config.json in it")
    import torch

    from merge.loading import CAUSAL, load_model, load_tokenizer

    tokenizer = load_tokenizer(os.fspath(model_dir))
    # float32 holds bf16 weights exactly, and CPUs without bf16 units are slow in bf16.
    model = load_model(CAUSAL, os.fspath(model_dir), dtype=torch.float32).network.eval()
    return score_model(model, tokenizer, skills, n_items, seed)
