"""What merge eval reads: tasks of one's own (.jsonl, .yaml)."""

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


class Format:
    def set_up(self, place: Place) -> Callable[[], object]:
        place.put("mine.yaml", TASK)
        return task("mine.yaml")

    def damage(self, place: Place, dice: random.Random) -> Callable[[], object]:
        match dice.randrange(2):
            case 0:
                row = dice.choice(ITEMS)
                lines = [damage.json_text(row, dice) if damage.chance(dice, 0.5) else b"{}" for _ in range(3)]
                place.put("mine.jsonl", b"\n".join([json.dumps(row).encode(), *lines]))
                return task("mine.jsonl")
            case _:
                place.put("mine.yaml", damaged_yaml(dice.choice((TASK, TASK, GROUP)), dice))
                return task("mine.yaml")


def task(name: str) -> Callable[[], object]:
    def read() -> object:
        from eval.tasks import resolve

        return resolve([name], None)

    return read
