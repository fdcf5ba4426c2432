"""What merge eval reads: tasks of one's own (.jsonl, .yaml); and what merge compare reads: results (.json)."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from typing import Any

from fuzz import damage
from fuzz.place import Place
from fuzz.recipes import damaged_yaml

ITEMS: tuple[dict[str, Any], ...] = (
    {"question": "a", "choices": ["b", "c"], "answer": 1},
    {"question": "a", "choices": ["b", "c"], "answer": "b"},
    {"question": "a", "answer": "b"},
)
TASK = """\
task: mine
dataset_path: json
dataset_kwargs: {data_files: {test: x.jsonl}}
doc_to_text: "{{question}}"
process_docs: !function utils.process
metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]
"""
GROUP = "group: all\ntask: [mine, other]\naggregate_metric_list: [{metric: acc}]\n"


COMPARE = ("compare", "results.json")


class Format:
    def set_up(self, place: Place) -> list[str]:
        place.put("results.json", json.dumps(results()))
        return [*COMPARE]

    def damage(self, place: Place, dice: random.Random) -> list[str] | Callable[[], object]:
        match dice.randrange(4):
            case 0:
                row = dice.choice(ITEMS)
                lines = [damage.json_text(row, dice) if damage.chance(dice, 0.5) else b"{}" for _ in range(3)]
                place.put("mine.jsonl", b"\n".join([json.dumps(row).encode(), *lines]))
                return task("mine.jsonl")
            case 1 | 2:
                place.put("results.json", damage.json_text(results(), dice))
                more = (
                    ("--json",),
                    ("--html", "page.html"),
                    ("--csv", "t.csv"),
                    ("--markdown", "t.md"),
                    ("--parents", "a"),
                    (),
                )
                return [*COMPARE, *dice.choice(more)]
            case _:
                place.put("mine.yaml", damaged_yaml(dice.choice((TASK, TASK, GROUP)), dice))
                return task("mine.yaml")


def task(name: str) -> Callable[[], object]:
    def read() -> object:
        from eval.tasks import resolve

        return resolve([name], None)

    return read


def results() -> dict[str, Any]:
    """Two parents and a merge on shares, losses, and a leaderboard's score of two parts."""
    scores: list[tuple[str, list[Any], str]] = [
        ("share", [1.0, 0.0, 1.0, 1.0], "acc,none"),
        ("loss", [[-3.5, 4.0], [-2.5, 3.0]], "bits_per_byte,none"),
        ("part", [0.0, 1.0, 1.0], "acc_norm,none"),
    ]
    tasks = {name: _task(name, items, metric) for name, items, metric in scores}
    parts = [{"task": "part", "metric": "acc_norm,none", "chance": 0.25}]
    tasks["board"] = _task("board", [], "score,none") | {"parts": parts, "n": 3}
    models = [
        {"name": name, "text": name, "path": None, "digest": name * 8, "parents": parents, "seconds": 1.5}
        | {"asked": 9, "remembered": 0, "tasks": tasks}
        for name, parents in (("a", []), ("b", []), ("merge", ["a", "b"]))
    ]
    questions = {"share": {"0": ["what?", "that"]}}
    return {"format": 2, "notes": [], "models": models, "tasks": ["share", "loss", "board"]} | {
        "settings": {"limit": None, "seed": 0},
        "versions": {"lm_eval": "0"},
        "questions": questions,
        "path": [],
    }


def _task(name: str, items: list[Any], metric: str) -> dict[str, Any]:
    word = metric.partition(",")[0]
    return {"name": name, "group": None, "metrics": {metric: 0.5, f"{word}_stderr,none": 0.1}, "metric": metric} | {
        "higher_is_better": True,
        "n": len(items),
        "version": "1",
        "doc_ids": list(range(len(items))),
        "items": items,
        "answers": ["yes"] * len(items),
        "also": {},
        "parts": [],
        "guard": None,
    }
