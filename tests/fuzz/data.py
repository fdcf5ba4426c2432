"""Data files: examples to train on, and texts."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fuzz import damage
from fuzz.place import Place

ROWS: tuple[dict[str, Any], ...] = (
    {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]},
    {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]},
    {"instruction": "a", "input": "b", "output": "c"},
    {"prompt": "a", "completion": "b"},
    {"prompt": "a", "chosen": "b", "rejected": "c"},
    {"anchor": "a", "positive": "b", "negative": "c"},
    {"text": "a", "label": 1},
    {"text": "a b c"},
    {
        "messages": [{"role": "assistant", "content": None, "tool_calls": [{"name": "f", "arguments": "{}"}]}],
        "tools": "[]",
    },
)


class Format:
    def set_up(self, place: Place) -> Callable[[], object]:
        place.put("d.jsonl", "".join(json.dumps(ROWS[3] | {"prompt": str(i)}) + "\n" for i in range(20)))
        return samples("d.jsonl")

    def damage(self, place: Place, dice: random.Random) -> Callable[[], object]:
        row = dice.choice(ROWS)
        name = dice.choice(("d.jsonl", "d.jsonl", "d.json", "d.csv", "d.tsv", "d.txt", "d.parquet"))
        lines = [
            damage.json_text(row, dice) if damage.chance(dice, 0.5) else json.dumps(row).encode() for _ in range(4)
        ]
        if name == "d.json":
            data = damage.json_text(dice.choice(([row] * 3, {"data": [row] * 3}, {"a": [], "b": []}, row)), dice)
        elif name in ("d.csv", "d.tsv"):
            comma = "," if name == "d.csv" else "\t"
            table = [comma.join(row), *(comma.join(str(damage.value(dice)) for _ in row) for _ in range(3))]
            data = damage.in_bytes("\n".join(table).encode("utf-8", "surrogatepass"), dice)
        else:
            data = b"\n".join(lines)
        place.put(name, data)
        return texts(name) if damage.chance(dice, 0.2) and name in ("d.jsonl", "d.txt") else samples(name)


def samples(name: str) -> Callable[[], object]:
    def read() -> object:
        from finetune.data import read_samples
        from finetune.keys import Config, DataSource

        return read_samples(Config(model="a", data=(DataSource(name),), validation=0.3), Path())

    return read


def texts(name: str) -> Callable[[], object]:
    def read() -> object:
        from merge.statistics.data import read_texts

        return read_texts(Path(name))

    return read
