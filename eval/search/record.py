"""Rows of a search, baselines and trials alike, and how their scores are stored in the study."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from eval.search.judges import Candidate
from eval.search.objective import Scores, SearchGoal, TaskScore
from eval.search.places import Value
from eval.search.study import BASELINE, NOTES, VIOLATION, StudyFile

State = Literal["whole", "stopped", "refused", "running"]


@dataclass(frozen=True)
class SearchRow:
    """
    Attributes:
        kind: "parent" or "default", both baselines, or "trial".
        scores: on the items that were asked.
        values: of the objectives; of a trial that was stopped early, the estimate.
        written: the values of the open places; recipe: that they make.
        asked, rounds: of a trial that was stopped early, its rounds and all there were.
        refused: why the recipe cannot be carried out.
    """

    name: str
    kind: str
    scores: Scores
    values: tuple[float, ...]
    state: State = "whole"
    number: int | None = None
    written: Mapping[str, Value] = field(default_factory=dict)
    recipe: str | None = None
    violation: float = 0.0
    asked: int = 0
    rounds: int = 0
    refused: str = ""
    seconds: float = 0.0

    @property
    def whole(self) -> bool:
        return self.state == "whole"

    def beats(self, other: SearchRow) -> bool:
        """Whether it is at least as good in every objective, and better in one; and keeps the constraint."""
        if not self.whole or self.recipe is None or self.violation > 0:
            return False
        pairs = list(zip(self.values, other.values, strict=True))
        return all(mine >= theirs for mine, theirs in pairs) and any(mine > theirs for mine, theirs in pairs)


def rows_of(study: StudyFile, objective: SearchGoal, candidates: Sequence[tuple[str, Candidate]]) -> list[SearchRow]:
    """The baselines, of a kind each, then the trials by their numbers."""
    known = study.study.user_attrs.get("baselines", {})
    rows = [_baseline(kind, each, unstored(known[each.name]), objective) for kind, each in candidates]
    return rows + [
        _trial(trial.number, trial.user_attrs.get(NOTES, {}), objective)
        for trial in study.trials
        if BASELINE not in trial.user_attrs  # a default that is a trial too
    ]


def _baseline(kind: str, candidate: Candidate, scores: Scores, objective: SearchGoal) -> SearchRow:
    return SearchRow(
        name=candidate.name,
        kind=kind,
        scores=scores,
        values=objective.values(scores),
        written=candidate.values,
        recipe=None if candidate.recipe is None else candidate.recipe.text,
        violation=objective.violation(scores),
    )


def _trial(number: int, notes: Mapping[str, Any], objective: SearchGoal) -> SearchRow:
    state: State = "running"
    scores: Scores = {}
    values: tuple[float, ...] = ()
    if "seconds" in notes:
        state = "refused" if "refused" in notes else "stopped" if "stopped" in notes else "whole"
    if "scores" in notes and state != "running":
        scores = unstored(notes["scores"])
        values = (float(notes["estimate"]),) if state == "stopped" else objective.values(scores)
    return SearchRow(
        name=f"trial {number}",
        kind="trial",
        scores=scores,
        values=values,
        state=state,
        number=number,
        written=notes.get("values", {}),
        recipe=notes.get("recipe"),
        violation=float(notes.get(VIOLATION, 0.0)),
        asked=int(notes.get("stopped", 0)),
        rounds=int(notes.get("rounds", 0)),
        refused=str(notes.get("refused", "")),
        seconds=float(notes.get("seconds", 0.0)),
    )


def stored(scores: Scores) -> dict[str, Any]:
    """As JSON: items in the order of their numbers."""
    return {
        task: {
            "value": score.value,
            "metric": score.metric,
            "higher": score.higher_is_better,
            "ids": list(score.items),
            "items": list(score.items.values()),
        }
        for task, score in scores.items()
    }


def unstored(data: Mapping[str, Any]) -> dict[str, TaskScore]:
    found = {}
    for task, each in data.items():
        items = [tuple(item) if isinstance(item, list) else item for item in each["items"]]
        pairs = dict(zip(each["ids"], items, strict=True))
        found[task] = TaskScore(each["value"], pairs, each["metric"], each["higher"])
    return found
