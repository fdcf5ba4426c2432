"""A task in one file: a line for each item, {"question": ..., "choices": [...], "answer": ...}.

`answer` is the number of the right choice, counted from 0, or its text. Without `choices` the model writes the answer,
which counts if it is the same text.
"""

from __future__ import annotations

import json
from pathlib import Path

import xxhash

from eval.tasks.task import Task, TaskItems
from merge.errors import UsageError
from merge.jsontext import JSONTextError, parse_json
from merge.quoting import quoted

_KEYS = ("question", "choices", "answer")


def jsonl_task(path: Path) -> Task:
    """Raises UsageError with the line of everything that is wrong."""
    rows = read_rows(path)
    multiple = "choices" in rows[0]
    config: dict[str, object] = {
        "task": path.stem,
        "custom_dataset": TaskItems(lambda: rows),
        "test_split": "test",
        "doc_to_text": "question",
        "metadata": {"version": _version(rows)},
    }
    metrics: tuple[str, ...]
    if multiple:
        metrics = ("acc", "acc_norm")
        config |= {"output_type": "multiple_choice", "doc_to_choice": "choices", "doc_to_target": "answer"}
    else:
        metrics = ("exact_match",)
        config |= {
            "output_type": "generate_until",
            "doc_to_target": "answer",
            "generation_kwargs": {"until": ["\n"], "max_gen_toks": _enough_tokens(rows), "do_sample": False},
        }
    config["metric_list"] = [{"metric": metric, "aggregation": "mean", "higher_is_better": True} for metric in metrics]
    return Task(path.stem, config, metrics[-1])


def _enough_tokens(rows: list[dict[str, object]]) -> int:
    """At most 64. A token writes a byte or more, so a longer text than this many tokens is longer than every answer.

    Two more than the longest answer has bytes: for a space in front that is a token, and for a token that goes on.
    """
    return min(64, 2 + max(len(str(row["answer"]).encode("utf-8", "surrogatepass")) for row in rows))


def _version(rows: list[dict[str, object]]) -> str:
    """A digest of the items, so that results of another file of the same name are not compared with these."""
    return xxhash.xxh3_64_hexdigest(json.dumps(rows, ensure_ascii=False).encode("utf-8", "surrogatepass"))


def read_rows(path: Path) -> list[dict[str, object]]:
    """The items, with `answer` as a number where there are choices."""
    rows, wrong = [], []
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{path}: cannot be read ({error}).") from None
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            rows.append(_row(parse_json(line)))
        except JSONTextError as error:
            wrong.append(f"{path}:{number}: {error}.")
        except ValueError as error:
            wrong.append(f"{path}:{number}: {error}")
    if not wrong and not rows:
        wrong.append(f"{path}: holds no item.")
    if not wrong and len({"choices" in row for row in rows}) > 1:
        wrong.append(f"{path}: some items have choices and some have none; put them into two files.")
    if wrong:
        more = f"\n{len(wrong) - 10} more." if len(wrong) > 10 else ""
        raise UsageError("\n".join(wrong[:10]) + more)
    return rows


def _row(item: object) -> dict[str, object]:
    """Raises ValueError with what is wrong."""
    if not isinstance(item, dict):
        raise ValueError('expected an object with "question" and "answer".')
    question, answer, choices = (item.get(key) for key in ("question", "answer", "choices"))
    if not isinstance(question, str) or not question:
        raise ValueError(f'"question": expected a text, found {quoted(question, 40)}.')
    if unknown := [key for key in item if key not in _KEYS]:
        raise ValueError(f'unknown key "{unknown[0]}"; known: {", ".join(_KEYS)}.')
    if choices is None:
        if not isinstance(answer, str):
            raise ValueError(f'"answer": expected a string if there are no choices, found {quoted(answer, 40)}.')
        return {"question": question, "answer": answer}
    if not isinstance(choices, list) or len(choices) < 2 or not all(isinstance(c, str) and c for c in choices):
        raise ValueError(f'"choices": expected at least two texts, found {quoted(choices, 40)}.')
    if len(set(choices)) < len(choices):
        raise ValueError(f'"choices": the same text twice, {quoted(choices, 40)}.')
    if isinstance(answer, str) and answer in choices:
        answer = choices.index(answer)
    if not isinstance(answer, int) or isinstance(answer, bool) or not 0 <= answer < len(choices):
        raise ValueError(f'"answer": expected one of the choices or its number from 0, found {quoted(answer, 40)}.')
    return {"question": question, "choices": choices, "answer": answer}
