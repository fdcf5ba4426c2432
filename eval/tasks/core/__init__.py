"""The core suite: small real test sets that come with this package, for a first look without a network.

    core_sentiment    is a message good or bad? two choices, chance is a half
    core_cloze        which of four endings is the sentence's own? chance is a quarter
    core_arithmetic   sums, differences, products, and two steps; the number has to be written
    core_logic        which of three follows from two or three facts? chance is a third
    core_lists        a question on some words: the last, the first in the alphabet, backwards; written
    core_lookup       a fact to be found among four lines; written
    core_json         the facts of a sentence as a JSON object
    core_tools        the call of one of three functions, as JSON
    core_code         a Python function from its docstring; what it returns decides, in eval/sandbox
    core_novel, core_speech, core_reference   bits per byte of prose of three kinds

data/ holds the texts and the functions; data/README.md says where they are from. Sums to tools are generated:
generated.py, structured.py.
"""

from __future__ import annotations

from eval.tasks.core.code import code_task
from eval.tasks.core.config import SHOTS, Dataset, rows, task_config
from eval.tasks.core.generated import Draw, draw_lists, draw_logic, draw_lookup, make, sums
from eval.tasks.core.structured import METRICS, check, draw_json, draw_tools
from eval.tasks.task import Suite, Task

_GENRES = ("novel", "speech", "reference")
_N_SUMS, _N_LOGIC, _N_LISTS, _N_LOOKUP, _N_STRUCTURED = 160, 150, 120, 120, 100
_MAX_JSON = 40  # tokens of an answer


def suite() -> Suite:
    tasks = (
        *(_sentiment(), _cloze(), _arithmetic(), _logic()),
        _written("core_lists", _drawn("core_lists", _N_LISTS, draw_lists), tokens=16),
        _written("core_lookup", _drawn("core_lookup", _N_LOOKUP, draw_lookup)),
        _structured("core_json", _N_STRUCTURED, draw_json, "JSON"),
        _structured("core_tools", _N_STRUCTURED, draw_tools, "Call"),
        *(code_task(), *map(_genre, _GENRES)),
    )
    return Suite("core", "reading, arithmetic, logic, JSON, tool calls, code that is run, prose; all offline", tasks)


def _sentiment() -> Task:
    config = task_config(
        "core_sentiment",
        Dataset(lambda: rows("sentiment")),
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
        Dataset(lambda: rows("cloze")),
        {"acc": True, "acc_norm": True},
        output_type="multiple_choice",
        doc_to_text="text",
        doc_to_choice="choices",
        doc_to_target="answer",
    )
    return Task("core_cloze", config, "acc_norm", num_fewshot=0)


def _arithmetic() -> Task:
    data = Dataset(lambda: sums(_N_SUMS), lambda: sums(SHOTS, "examples"))
    return _written("core_arithmetic", data, ("number", r"^\s*(-?\d+)\s*\.?\s*$"))


def _logic() -> Task:
    config = task_config(
        "core_logic",
        Dataset(lambda: make("core_logic", _N_LOGIC, draw_logic)),
        {"acc": True},
        output_type="multiple_choice",
        doc_to_text="text",
        doc_to_choice="choices",
        doc_to_target="answer",
    )
    return Task("core_logic", config, "acc", num_fewshot=0)


def _drawn(name: str, n: int, draw: Draw) -> Dataset:
    return Dataset(lambda: make(name, n, draw), lambda: make(name, SHOTS, draw, part="examples"))


# The words of the line, without the space before them and a full stop.
_LINE = ("line", r"^\s*(.*?)\s*\.?\s*$")


def _written(name: str, data: Dataset, answer: tuple[str, str] = _LINE, tokens: int = 8) -> Task:
    """A question whose answer is written, on one line; `answer`: a name, and what of the whole line counts."""
    kind, pattern = answer
    found = {"function": "regex", "regex_pattern": pattern}
    config = task_config(
        name,
        data,
        {"exact_match": True},
        output_type="generate_until",
        doc_to_text="Question: {{question}}\nAnswer:",
        doc_to_target="{{answer}}",
        generation_kwargs={"until": ["\n"], "max_gen_toks": tokens, "do_sample": False},
        filter_list=[{"name": kind, "filter": [found, {"function": "take_first"}]}],
    )
    return Task(name, config, "exact_match", num_fewshot=SHOTS)


def _structured(name: str, n: int, draw: Draw, label: str) -> Task:
    """An answer that has to be JSON; structured.py."""
    config = task_config(
        name,
        _drawn(name, n, draw),
        METRICS,
        output_type="generate_until",
        doc_to_text=f"{{{{text}}}}\n{label}:",
        doc_to_target="{{answer}}",
        process_results=check,
        generation_kwargs={"until": ["\n"], "max_gen_toks": _MAX_JSON, "do_sample": False},
    )
    return Task(name, config, "exact_match", num_fewshot=SHOTS)


def _genre(genre: str) -> Task:
    name = f"core_{genre}"
    config = task_config(
        name,
        Dataset(lambda: [row for row in rows("genres") if row["genre"] == genre]),
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
