"""Reads lm-eval's log of each item: its score, its question, and the model's answer, shortened.

Only the first items keep their texts, shortened: enough to inspect gains and losses, while results of tens of thousands
of items stay small.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

Item = float | tuple[float, float]  # a score; or a loss in nats and the words or bytes it is of, for perplexities
Floats = npt.NDArray[np.float64]

KEPT = 1000  # items of a task with kept texts
_QUESTION, _ANSWER = 240, 80  # letters
_OVER_UNITS = ("word_perplexity", "byte_perplexity", "bits_per_byte")  # log-likelihood and number of units


@dataclass(frozen=True)
class StoredSamples:
    """One model's items of one task, in one order. `questions`: doc id -> (question, right answer)."""

    doc_ids: tuple[int, ...] = ()
    items: tuple[Item, ...] = ()
    answers: tuple[str, ...] = ()
    questions: Mapping[str, tuple[str, str]] | None = None


def read_samples(logged: Sequence[Mapping[str, Any]], metric: str, value: float) -> StoredSamples:
    """The items of a task; none if their scores do not make up its score (f1, bleu ... are of all items together).

    Args:
        logged: lm-eval's samples.
        metric: lm-eval's key, "acc_norm,none".
        value: the task's score under that key.
    """
    name, _, filter_name = metric.partition(",")
    chosen = [sample for sample in logged if sample.get("filter", filter_name) == filter_name]
    items = [_item(sample.get(name), name) for sample in chosen]
    scores = tuple(item for item in items if item is not None)
    if not scores or len(scores) < len(items):
        return StoredSamples()
    ids = tuple(int(sample["doc_id"]) for sample in chosen)
    pairs = as_pairs(scores)
    if not math.isclose(float(aggregate(name, *pairs.sum(axis=0))), value, rel_tol=1e-6, abs_tol=1e-9):
        return StoredSamples()
    kept = chosen[:KEPT]
    return StoredSamples(
        ids,
        scores,
        tuple(_answer(sample, name) for sample in kept),
        {str(int(sample["doc_id"])): (_question(sample), _target(sample)) for sample in kept},
    )


def as_pairs(items: Sequence[Item]) -> Floats:
    """(item, 2): score and weight."""
    pairs = [item if isinstance(item, tuple) else (item, 1.0) for item in items]
    return np.array(pairs, dtype=np.float64).reshape(-1, 2)


def aggregate(metric: str, score: Floats | float, weight: Floats | float) -> Floats:
    """A task's score from the sums over its items of scores and weights."""
    mean = np.divide(score, weight)
    if metric == "bits_per_byte":
        return mean / math.log(2)
    return np.exp(mean) if metric.endswith("perplexity") else mean


def _item(value: Any, metric: str) -> Item | None:
    if metric in _OVER_UNITS:
        return (-float(value[0]), float(value[1])) if _is_pair(value) and value[1] > 0 else None
    if isinstance(value, (bool, int, float, np.number)):
        return -float(value) if metric == "perplexity" else float(value)  # lm-eval logs the log-likelihood
    if isinstance(value, list) and value and all(isinstance(each, bool) for each in value):
        return float(sum(value)), float(len(value))  # several rights and wrongs in one item
    return None


def _is_pair(value: object) -> bool:
    return isinstance(value, (tuple, list)) and len(value) == 2 and all(isinstance(v, (int, float)) for v in value)


def _question(sample: Mapping[str, Any]) -> str:
    """The end of the prompt, without the examples before it."""
    arguments = sample["arguments"][0]
    text = str(arguments[0]) or str(arguments[-1])
    return _cut(text.strip().rpartition("\n\n")[2], _QUESTION, tail=True)


def _target(sample: Mapping[str, Any]) -> str:
    target, arguments = sample["target"], sample["arguments"]
    if isinstance(target, int) and not isinstance(target, bool) and 0 <= target < len(arguments) > 1:
        target = arguments[target][1]
    return _cut(str(target).strip(), _ANSWER)


def _answer(sample: Mapping[str, Any], metric: str) -> str:
    """The generated text, or the most likely choice; "" if the item has neither."""
    found, arguments = sample["filtered_resps"], sample["arguments"]
    if len(found) == 1 and isinstance(found[0], str):
        return _cut(found[0].strip(), _ANSWER)
    if len(found) > 1 and all(isinstance(each, (tuple, list)) for each in found):
        choices = [str(argument[1]) for argument in arguments[: len(found)]]
        lengths = [max(1, len(choice.strip())) if metric == "acc_norm" else 1 for choice in choices]
        likely = [float(each[0]) / length for each, length in zip(found, lengths, strict=True)]
        return _cut(choices[likely.index(max(likely))].strip(), _ANSWER)
    return ""


def _cut(text: str, length: int, tail: bool = False) -> str:
    if len(text) <= length:
        return text
    return "…" + text[1 - length :] if tail else text[: length - 1] + "…"
