"""Compares a merge with its parents item by item: which items only one of them gets right."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from eval.compare import Merged
from eval.results import Questions, TaskResult


@dataclass(frozen=True)
class AgreementRow:
    model: str
    right: tuple[bool, ...]
    role: str


@dataclass(frozen=True)
class AgreementCounts:
    """Counts of items that merge and parent get right: both, only one of them, neither."""

    parent: str
    both: int
    gained: int
    lost: int
    neither: int


@dataclass(frozen=True)
class Grid:
    """
    Attributes:
        doc_ids: the items, in the order of the rows: what the merge gets right first, then what most parents do.
        rows: parents, then the merge.
        rival: the parent that is best on this task.
    """

    name: str
    doc_ids: tuple[int, ...]
    rows: tuple[AgreementRow, ...]
    counts: tuple[AgreementCounts, ...]
    rival: str


@dataclass(frozen=True)
class AgreementExample:
    """One item. `answers`: for each row of the grid, whether it is right, and its text."""

    question: str
    target: str
    answers: tuple[tuple[bool, str], ...]


def grids(merged: Merged, tasks: Sequence[str]) -> Iterator[Grid]:
    """A grid for each task whose items are right or wrong."""
    merge = merged.model
    for name in tasks:
        models = (*merged.parents, merge)
        tables = [_right(model.tasks[name]) for model in models]
        shared = [doc for doc in tables[-1] or {} if all(table is not None and doc in table for table in tables)]
        if not shared:
            continue
        known = [table for table in tables if table is not None]
        patterns = {doc: tuple(table[doc] for table in known) for doc in shared}

        def order(doc: int, patterns: dict[int, tuple[bool, ...]] = patterns) -> tuple[object, ...]:
            *others, mine = patterns[doc]
            return (not mine, -sum(others), [not one for one in others], doc)

        ids = tuple(sorted(shared, key=order))
        rows = tuple(
            AgreementRow(
                model.name, tuple(patterns[doc][place] for doc in ids), "merge" if model is merge else "parent"
            )
            for place, model in enumerate(models)
        )
        gain = next(gain for gain in merged.gains if gain.task == name)
        yield Grid(name, ids, rows, tuple(_counts(row, rows[-1]) for row in rows[:-1]), gain.best.other)


def _right(task: TaskResult) -> dict[int, bool] | None:
    if not task.items or any(item not in (0.0, 1.0) for item in task.items):
        return None
    return {doc: item == 1.0 for doc, item in zip(task.doc_ids, task.items, strict=True)}


def _counts(parent: AgreementRow, merge: AgreementRow) -> AgreementCounts:
    pairs = list(zip(merge.right, parent.right, strict=True))
    return AgreementCounts(
        parent.model, *(pairs.count(kind) for kind in ((True, True), (True, False), (False, True), (False, False)))
    )


def examples(merged: Merged, asked: Questions, grid: Grid, kind: str, most: int) -> list[AgreementExample]:
    """Items `gained` or `lost` against the best parent, if their texts are kept in `asked`."""
    questions = asked.get(grid.name, {})
    models = {model.name: model for model in (*merged.parents, merged.model)}
    rival = next(place for place, row in enumerate(grid.rows) if row.model == grid.rival)
    wanted = (True, False) if kind == "gained" else (False, True)
    answers = {name: dict(zip(m.tasks[grid.name].doc_ids, m.tasks[grid.name].answers)) for name, m in models.items()}  # noqa: B905 - of the first only
    found = []
    for place, doc in enumerate(grid.doc_ids):
        right = [row.right[place] for row in grid.rows]
        if (right[-1], right[rival]) != wanted or str(doc) not in questions:
            continue
        said = tuple((one, answers[row.model].get(doc, "")) for one, row in zip(right, grid.rows, strict=True))
        question, target = questions[str(doc)]
        found.append(AgreementExample(question, target, said))
        if len(found) == most:
            break
    return found
