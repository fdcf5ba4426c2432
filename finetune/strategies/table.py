"""Shows the results of a task file: a table (models x tasks), what a sequence forgot, and JSON."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from finetune.strategies.score import StrategyScore
from merge.output.directory import explained, write_whole

RESULTS = "results.json"


@dataclass(frozen=True)
class Result:
    """A model and its scores. `stage`: of a sequence, the task of an expert, the name of a merge, or ""."""

    strategy: str
    stage: str
    path: str
    scores: dict[str, StrategyScore]

    @property
    def name(self) -> str:
        return f"{self.strategy} {self.stage}".strip()

    @property
    def loss(self) -> float:
        """Mean over tasks, each counting the same."""
        return sum(score.loss for score in self.scores.values()) / len(self.scores)

    @property
    def exact(self) -> float | None:
        """Mean over tasks, None unless all have it."""
        shares = [score.exact for score in self.scores.values() if score.exact is not None]
        return sum(shares) / len(shares) if len(shares) == len(self.scores) else None


def forgetting(tasks: Sequence[str], results: Sequence[Result]) -> dict[str, dict[str, float | None]] | None:
    """task -> how much worse it is after the last stage than after its own: loss (nats), exact (share). Not the last.

    The negative of backward transfer in Lopez-Paz and Ranzato 2017 (arXiv:1706.08840), section 2, by task.
    """
    stages = [result for result in results if result.strategy == "sequential"]
    if not stages:
        return None
    found: dict[str, dict[str, float | None]] = {}
    for task, own in zip(tasks[:-1], stages, strict=False):
        after, last = own.scores[task], stages[-1].scores[task]
        exact = None if after.exact is None or last.exact is None else after.exact - last.exact
        found[task] = {"loss": last.loss - after.loss, "exact": exact}
    return found


def as_json(tasks: Sequence[str], results: Sequence[Result]) -> dict[str, object]:
    """`loss`: nats a token, on held-out data; `exact`: share of right answers, `exact_error` its standard error."""
    return {
        "format": 1,
        "tasks": list(tasks),
        "models": [
            {
                "name": result.name,
                "strategy": result.strategy,
                "stage": result.stage,
                "path": result.path,
                "scores": {
                    task: {
                        "loss": score.loss,
                        "perplexity": math.exp(score.loss) if score.loss < 700 else None,
                        "exact": score.exact,
                        "exact_error": score.exact_error,
                        "examples": score.examples,
                    }
                    for task, score in result.scores.items()
                },
                "mean": {"loss": result.loss, "exact": result.exact},
            }
            for result in results
        ],
        "forgetting": forgetting(tasks, results),
    }


def write_results(out: Path, tasks: Sequence[str], results: Sequence[Result]) -> None:
    """OUT/results.json, whole or not at all."""
    text = json.dumps(as_json(tasks, results), indent=2, ensure_ascii=False) + "\n"
    with explained(out):
        write_whole(out / RESULTS, text.encode())


def rows(tasks: Sequence[str], results: Sequence[Result]) -> list[list[str]]:
    """The table as text: a heading, then a row a model. Loss in nats a token, exact match in %."""
    exact = all(result.exact is not None for result in results)
    heading = ["model", *tasks, "mean"]
    lines = []
    for result in results:
        shown: list[StrategyScore | Result] = [*result.scores.values(), result]
        lines.append([result.name, *(_cell(one.loss, one.exact if exact else None) for one in shown)])
    lost = forgetting(tasks, results)
    if lost:
        cells = []
        for one in map(lost.get, tasks):
            gained = None if one is None or one["exact"] is None or not exact else -one["exact"]
            cells.append("" if one is None else _cell(one["loss"] or 0.0, gained, sign="+"))
        lines.append(["forgotten in sequence", *cells, ""])
    return [heading, *lines]


def _cell(loss: float, exact: float | None, sign: str = "") -> str:
    return f"{loss:{sign}.3f}" + ("" if exact is None else f"  {100 * exact:{sign}6.1f}%")
