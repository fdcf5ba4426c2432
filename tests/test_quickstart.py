"""The quickstart family is what its README says, and the checkers that say so are right."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest

from eval.exact_match import SKILLS, Score, held_out, questions, score

FAMILY = Path(__file__).parents[1] / "recipes" / "quickstart"
MEMBERS = ("base", *SKILLS)


@pytest.fixture(scope="module")
def scores() -> dict[str, dict[str, Score]]:
    return {member: score(FAMILY / member, n_items=60, seed=3) for member in MEMBERS}


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(FAMILY / "base", local_files_only=True)


@pytest.mark.parametrize(
    ("skill", "question", "answer"),
    [
        ("reverse", "stone", "enots"),
        ("reverse", "aab", "baa"),
        ("sort", "stone", "enost"),
        ("sort", "banana", "aaabnn"),
        ("add", "47+85", "132"),
        ("add", "10+10", "20"),
    ],
)
def test_checker_accepts_the_right_answer_only(skill: str, question: str, answer: str) -> None:
    check = SKILLS[skill].check
    assert check(question, answer)
    for wrong in ("", answer[:-1], answer + " ", answer + answer[-1], " " + answer, "<eos>" + answer):
        assert not check(question, wrong)


@pytest.mark.parametrize("name", SKILLS)
def test_sides_of_the_split_never_meet_and_seeds_repeat(name: str) -> None:
    skill = SKILLS[name]
    train = questions(skill, 300, random.Random(1), test=False)
    test = questions(skill, 100, random.Random(1), test=True)
    assert not set(train) & set(test)
    assert len(set(test)) == len(test)
    assert all(held_out(skill.prompt(question)) for question in test)
    assert test == questions(skill, 100, random.Random(1), test=True)


def test_every_character_is_one_token_and_round_trips(tokenizer: Any) -> None:
    for text in ("reverse:stone=enots", "add:47+85=132", "sort:zyxwvutsrqponmlkjihgfedcba", "0123456789 .,?!-"):
        ids = tokenizer(text)["input_ids"]
        assert len(ids) == len(text)
        assert tokenizer.decode(ids) == text


@pytest.mark.parametrize("member", MEMBERS)
def test_members_are_bf16_llamas_with_the_same_tokenizer(member: str) -> None:
    from safetensors import safe_open

    config = json.loads((FAMILY / member / "config.json").read_text())
    assert (config["model_type"], config["dtype"], config["num_hidden_layers"]) == ("llama", "bfloat16", 5)
    with safe_open(FAMILY / member / "model.safetensors", "pt") as weights:
        slices = [weights.get_slice(name) for name in weights.keys()]  # noqa: SIM118 - not a dictionary
        assert {one.get_dtype() for one in slices} == {"BF16"}
    for file in ("tokenizer.json", "tokenizer_config.json", "config.json"):
        assert (FAMILY / member / file).read_bytes() == (FAMILY / "base" / file).read_bytes()


def test_base_half_knows_every_skill(scores: dict[str, dict[str, Score]]) -> None:
    assert all(0.3 <= one.share <= 0.7 for one in scores["base"].values()), scores["base"]


@pytest.mark.parametrize("name", SKILLS)
def test_expert_masters_its_skill_and_no_other(name: str, scores: dict[str, dict[str, Score]]) -> None:
    assert scores[name][name].share >= 0.9, scores[name]
    assert all(one.share <= 0.8 for other, one in scores[name].items() if other != name), scores[name]
