"""The core suite: small real test sets that come with this package, for a first look without a network.

    core_sentiment    is a message good or bad? two choices, chance is a half
    core_cloze        which of four endings is the sentence's own? chance is a quarter
    core_arithmetic   sums, differences, products, and two steps; the number has to be written
    core_code         a Python function from its docstring; tests decide, run in eval/sandbox.py
    core_novel, core_speech, core_reference   bits per byte of prose of three kinds

data/ holds the texts; data/README.md says where they are from. functions.py holds the problems of core_code.
"""

from __future__ import annotations

import ast
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from eval.tasks import Suite, Task
from merge.jsontext import parse_json

_HERE = Path(__file__).parent
_VERSION = {"version": 1.0}
_GENRES = ("novel", "speech", "reference")
_N_SUMS = 80
_SHOTS = 4
_MAX_CODE = 96  # tokens of an answer
# What a function cannot go on with: the next thing at the left margin.
_END_OF_FUNCTION = ["\ndef", "\nclass", "\nassert", "\nprint", "\nif", "\n#", "\n```", "\n@"]
_IMPORTS = "from __future__ import annotations\nimport collections\nimport math\nimport re\nfrom typing import *\n\n\n"


def suite() -> Suite:
    tasks = (_sentiment(), _cloze(), _arithmetic(), _code(), *map(_genre, _GENRES))
    return Suite("core", "sentiment, cloze, arithmetic, code that is run, prose of three kinds; all offline", tasks)


@dataclass(frozen=True)
class _Dataset:
    """What lm-eval calls for the items; `examples` are those shown in prompts."""

    rows: Callable[[], Sequence[Mapping[str, Any]]]
    examples: Callable[[], Sequence[Mapping[str, Any]]] | None = None

    def __call__(self, **settings: Any) -> dict[str, Any]:
        from datasets import Dataset

        found = {"test": Dataset.from_list(list(self.rows()))}
        if self.examples is not None:
            found["examples"] = Dataset.from_list(list(self.examples()))
        return found


def _config(name: str, data: _Dataset, metrics: Mapping[str, bool], **settings: Any) -> dict[str, Any]:
    """
    Args:
        metrics: name -> whether higher is better; averaged over items.
    """
    listed = [{"metric": metric, "aggregation": "mean", "higher_is_better": up} for metric, up in metrics.items()]
    fewshot = {"fewshot_split": "examples", "fewshot_config": {"sampler": "first_n"}, "num_fewshot": _SHOTS}
    return {
        "task": name,
        "custom_dataset": data,
        "test_split": "test",
        "metric_list": listed,
        "metadata": _VERSION,
        **(fewshot if data.examples is not None else {"num_fewshot": 0}),
        **settings,
    }


def _rows(name: str) -> list[dict[str, Any]]:
    lines = (_HERE / "data" / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()
    return [parse_json(line) for line in lines]


def _sentiment() -> Task:
    config = _config(
        "core_sentiment",
        _Dataset(lambda: _rows("sentiment")),
        {"acc": True},
        output_type="multiple_choice",
        doc_to_text='Message: "{{text}}"\nIs this message positive or negative? It is',
        doc_to_choice=["negative", "positive"],
        doc_to_target="{{positive | int}}",
    )
    return Task("core_sentiment", config, "acc", num_fewshot=0)


def _cloze() -> Task:
    config = _config(
        "core_cloze",
        _Dataset(lambda: _rows("cloze")),
        {"acc": True, "acc_norm": True},
        output_type="multiple_choice",
        doc_to_text="text",
        doc_to_choice="choices",
        doc_to_target="answer",
    )
    return Task("core_cloze", config, "acc_norm", num_fewshot=0)


def _arithmetic() -> Task:
    config = _config(
        "core_arithmetic",
        _Dataset(lambda: sums(_N_SUMS, "test"), lambda: sums(_SHOTS, "examples")),
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
    return Task("core_arithmetic", config, "exact_match", num_fewshot=_SHOTS)


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


def _code() -> Task:
    config = _config(
        "core_code",
        _Dataset(problems),
        {"pass@1": True},
        output_type="generate_until",
        doc_to_text="{{prompt}}",
        doc_to_target="{{tests}}",
        process_results=check,
        generation_kwargs={"until": _END_OF_FUNCTION, "max_gen_toks": _MAX_CODE, "do_sample": False},
        unsafe_code=True,
    )
    return Task("core_code", config, "pass@1", num_fewshot=0)


def problems() -> list[dict[str, str]]:
    """name, prompt (the function up to the end of its docstring), solution (the rest of it), tests.

    The line break after the docstring belongs to the solution: tokenizers join it with the indentation that follows,
    and models asked to go on from a lone one write no code.
    """
    source = (_HERE / "functions.py").read_text(encoding="utf-8")
    lines = source.splitlines(keepends=True)
    found: list[dict[str, str]] = []
    for node in ast.parse(source).body:
        if isinstance(node, ast.FunctionDef):
            docstring = node.body[0]
            assert docstring.end_lineno is not None
            found.append(
                {
                    "name": node.name,
                    "prompt": "".join(lines[node.lineno - 1 : docstring.end_lineno]).rstrip("\n"),
                    "solution": "\n" + "".join(lines[docstring.end_lineno : node.end_lineno]),
                    "tests": "",
                }
            )
        elif isinstance(node, ast.Assert):
            found[-1]["tests"] += "".join(lines[node.lineno - 1 : node.end_lineno])
    return found


def check(problem: Mapping[str, str], answers: Sequence[str]) -> dict[str, float]:
    """Whether the function that the model finished passes its tests."""
    from eval.sandbox import passes

    program = f"{_IMPORTS}{problem['prompt']}{answers[0]}\n\n\n{problem['tests']}"
    return {"pass@1": float(passes(program))}


def _genre(genre: str) -> Task:
    name = f"core_{genre}"
    config = _config(
        name,
        _Dataset(lambda: [row for row in _rows("genres") if row["genre"] == genre]),
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
