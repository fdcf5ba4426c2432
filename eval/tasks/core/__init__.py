"""The core suite: small real test sets that come with this package, for a first look without a network.

    core_sentiment    is a message good or bad? two choices, chance is a half
    core_cloze        which of four endings is the sentence's own? chance is a quarter
    core_arithmetic   sums, differences, products, and two steps; the number has to be written
    core_code         a Python function from its docstring; what it returns decides, in eval/sandbox
    core_novel, core_speech, core_reference   bits per byte of prose of three kinds

data/ holds the texts; data/README.md says where they are from. functions.py holds the problems of core_code.
"""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

from eval.tasks import Suite, Task
from eval.tasks.core.code import code_task
from eval.tasks.core.config import SHOTS, Dataset, task_config
from merge.jsontext import parse_json

_HERE = Path(__file__).parent
_GENRES = ("novel", "speech", "reference")
_N_SUMS = 80


def suite() -> Suite:
    tasks = (_sentiment(), _cloze(), _arithmetic(), code_task(), *map(_genre, _GENRES))
    return Suite("core", "sentiment, cloze, arithmetic, code that is run, prose of three kinds; all offline", tasks)


def _rows(name: str) -> list[dict[str, Any]]:
    lines = (_HERE / "data" / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()
    return [parse_json(line) for line in lines]


def _sentiment() -> Task:
    config = task_config(
        "core_sentiment",
        Dataset(lambda: _rows("sentiment")),
        {"acc": True},
        output_type="multiple_choice",
        doc_to_text='Message: "{{text}}"\nIs this message positive or negative? It is',
        doc_to_choice=["negative", "positive"],
        doc_to_target="{{positive | int}}",
    )
    return Task("core_sentiment", config, "acc", num_fewshot=0)


def _cloze() -> Task:
    config = task_config(
        "core_cloze",
        Dataset(lambda: _rows("cloze")),
        {"acc": True, "acc_norm": True},
        output_type="multiple_choice",
        doc_to_text="text",
        doc_to_choice="choices",
        doc_to_target="answer",
    )
    return Task("core_cloze", config, "acc_norm", num_fewshot=0)


def _arithmetic() -> Task:
    config = task_config(
        "core_arithmetic",
        Dataset(lambda: sums(_N_SUMS, "test"), lambda: sums(SHOTS, "examples")),
        {"exact_match": True},
        output_type="generate_until",
        doc_to_text="Question: {{question}}\nAnswer:",
        doc_to_target="{{answer}}",
        generation_kwargs={"until": ["\n"], "max_gen_toks": 8, "do_sample": False},
        filter_list=[
            {
                "name": "number",
                "filter": [
                    {"function": "regex", "regex_pattern": r"^\s*(-?\d+)\s*\.?\s*$"},
                    {"function": "take_first"},
                ],
            }
        ],
    )
    return Task("core_arithmetic", config, "exact_match", num_fewshot=SHOTS)


def sums(n: int, seed: str) -> list[dict[str, str]]:
    """n different questions, the four kinds in turn, with their answers."""
    rng = random.Random(seed)
    found: dict[str, str] = {}
    while len(found) < n:
        kind = len(found) % 4
        a, b, c = rng.randint(2, 60), rng.randint(2, 60), rng.randint(2, 9)
        a, b = max(a, b), min(a, b)
        asked, answer = (
            (f"What is {a} + {b}?", a + b),
            (f"What is {a} - {b}?", a - b),
            (f"What is {a % 8 + 2} * {c}?", (a % 8 + 2) * c),
            (f"Tom has {a} apples. He gives {b} of them away and buys {c} more. How many has he now?", a - b + c),
        )[kind]
        found.setdefault(asked, str(answer))
    return [{"question": question, "answer": answer} for question, answer in found.items()]


def _genre(genre: str) -> Task:
    name = f"core_{genre}"
    config = task_config(
        name,
        Dataset(lambda: [row for row in _rows("genres") if row["genre"] == genre]),
        {},
        output_type="loglikelihood_rolling",
        doc_to_text="",
        doc_to_target="text",
    )
    config["metric_list"] = [
        {"metric": metric, "aggregation": aggregation, "higher_is_better": False}
        for metric, aggregation in (("bits_per_byte", "bits_per_byte"), ("word_perplexity", "weighted_perplexity"))
    ]
    return Task(name, config, "bits_per_byte", num_fewshot=0)
