"""Results made up for tests: models with given items on given tasks."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from eval.results import ModelScores, Results, TaskResult
from eval.samples import Item, aggregate, as_pairs


def task(
    name: str, items: Sequence[Item], metric: str = "acc", better: bool = True, group: str | None = None
) -> TaskResult:
    value = float(aggregate(metric, *as_pairs(items).sum(axis=0)))
    error = math.sqrt(max(value * (1 - value), 0) / len(items)) if better else 0.1
    return TaskResult(
        name=name,
        group=group,
        metrics={f"{metric},none": value, f"{metric}_stderr,none": error},
        metric=f"{metric},none",
        higher_is_better=better,
        n=len(items),
        version="1",
        doc_ids=tuple(range(len(items))),
        items=tuple(items),
        answers=tuple(f"answer {i}" for i in range(len(items))),
    )


def model(name: str, tasks: Sequence[TaskResult], parents: Sequence[str] = ()) -> ModelScores:
    return ModelScores(name, name, None, f"digest-{name}", tuple(parents), 1.0, 10, 0, {one.name: one for one in tasks})


def results(models: Sequence[ModelScores], path: Sequence[float] = ()) -> Results:
    names = tuple(name for name, one in models[0].tasks.items() if one.group is None)
    questions = {name: {str(i): (f"question {i}?", "yes") for i in range(models[0].tasks[name].n)} for name in names}
    return Results(tuple(models), names, {"limit": None, "seed": 0}, {"lm_eval": "0"}, questions, tuple(path))


def family(scores: Mapping[str, tuple[int, int]], n: int = 100) -> Results:
    """name -> right answers of n on the tasks math and code, the first ones; "merge" is of all others."""
    others = [name for name in scores if name != "merge"]
    models = []
    for name, rights in scores.items():
        tasks = [
            task(t, [float(i < right) for i in range(n)]) for t, right in zip(("math", "code"), rights, strict=True)
        ]
        models.append(model(name, tasks, others if name == "merge" else ()))
    return results(models)
