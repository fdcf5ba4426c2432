"""Tasks of the core suite in lm-eval's words."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from merge.jsontext import parse_json

_VERSION = 3.0  # of the items: results of different versions are not compared
SHOTS = 4  # examples in a prompt, where a task has any


@dataclass(frozen=True)
class Dataset:
    """What lm-eval calls for the items; `examples` are those shown in prompts."""

    rows: Callable[[], Sequence[Mapping[str, Any]]]
    examples: Callable[[], Sequence[Mapping[str, Any]]] | None = None

    def __call__(self, **settings: Any) -> dict[str, Any]:
        import datasets

        found = {"test": datasets.Dataset.from_list(list(self.rows()))}
        if self.examples is not None:
            found["examples"] = datasets.Dataset.from_list(list(self.examples()))
        return found


def rows(name: str) -> list[dict[str, Any]]:
    """data/NAME.jsonl"""
    text = (Path(__file__).parent / "data" / f"{name}.jsonl").read_text(encoding="utf-8")
    return [parse_json(line) for line in text.splitlines()]


def task_config(name: str, data: Dataset, metrics: Mapping[str, bool], **settings: Any) -> dict[str, Any]:
    """A task as lm-eval takes it.

    Args:
        metrics: name -> whether higher is better; averaged over items.
    """
    listed = [{"metric": metric, "aggregation": "mean", "higher_is_better": up} for metric, up in metrics.items()]
    fewshot = {"fewshot_split": "examples", "fewshot_config": {"sampler": "first_n"}, "num_fewshot": SHOTS}
    return {
        "task": name,
        "custom_dataset": data,
        "test_split": "test",
        "metric_list": listed,
        "metadata": {"version": _VERSION},
        **(fewshot if data.examples is not None else {"num_fewshot": 0}),
        **settings,
    }
