"""The quickstart suite: the three skills of the quickstart family, exact match on held-out prompts."""

from __future__ import annotations

import functools
import random

from eval.exact_match import MAX_ANSWER, SKILLS, questions
from eval.tasks.task import Suite, Task, TaskItems

ITEMS = 500  # a skill
END = "\n"


def suite() -> Suite:
    tasks = tuple(Task(name, _config(name), "exact_match") for name in SKILLS)
    return Suite("quickstart", f"reverse, sort and add: {ITEMS} held-out prompts each, exact match", tasks)


def _config(name: str) -> dict[str, object]:
    return {
        "task": name,
        "custom_dataset": TaskItems(functools.partial(_items, name)),
        "test_split": "test",
        "output_type": "generate_until",
        "doc_to_text": "prompt",
        "doc_to_target": "answer",
        "generation_kwargs": {"until": [END], "max_gen_toks": MAX_ANSWER, "do_sample": False},
        "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
        "metadata": {"version": 1.0},
    }


def _items(name: str) -> list[dict[str, str]]:
    """The prompts of one skill; the same in every run."""
    skill = SKILLS[name]
    asked = questions(skill, ITEMS, random.Random(f"0:{name}"), test=True)
    return [{"prompt": skill.prompt(question), "answer": skill.solve(question)} for question in asked]
