"""search(): looks for the values of a recipe's open places that score best, and reports on items it never chose by.

found = search("recipe.yaml", judge, out="merged/search", trials=30)
found.best.recipe.text
"""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from eval.search.baselines import DEFAULT, PARENT, baselines, fits
from eval.search.judges import Candidate, FunctionJudge, Judge
from eval.search.objective import Scores, SearchGoal, TaskScore, duel
from eval.search.places import Value
from eval.search.record import SearchRow, rows_of, stored, unstored
from eval.search.space import Space
from eval.search.stopping import Rounds
from eval.search.study import VIOLATION, StudyFile
from merge.errors import MergeError, RecipeError, UsageError
from merge.schema.document import written

if TYPE_CHECKING:
    from optuna import Trial

    from eval.results import Results


CHOSEN = "search"  # the name of the best in the report


@dataclass(frozen=True)
class SearchStep:
    """What a search says after each baseline and trial.

    Attributes:
        done, mine, total: trials of all processes, of this one, and of the budget (None: no limit).
        seconds: since this process began.
    """

    row: SearchRow
    best: SearchRow | None
    done: int
    mine: int
    total: int | None
    seconds: float


@dataclass(frozen=True)
class Found:
    """
    Attributes:
        rows: baselines and trials, in order.
        best: the row of the best recipe; None if no trial was finished.
        front: with several objectives, the rows that no other beats in all of them.
        report: parents, defaults and the best on the other items; None where a judge has none.
        recipe: the text of the best.
        test_sets: tasks of the objective that are test sets of leaderboards.
        importance: of each place that all trials have, as shares of 1; {} where there are too few trials.
    """

    space: Space
    objective: SearchGoal
    tasks: tuple[str, ...]
    rows: tuple[SearchRow, ...]
    best: SearchRow | None
    front: tuple[SearchRow, ...]
    report: Results | None
    interrupted: bool
    test_sets: tuple[str, ...] = ()
    importance: Mapping[str, float] = field(default_factory=dict)

    @property
    def n_trials(self) -> int:
        return sum(row.kind == "trial" and row.state != "running" for row in self.rows)

    @property
    def recipe(self) -> str | None:
        return self.best.recipe if self.best is not None else None


def search(
    recipe: str | Path | Space,
    objective: Judge | Callable[[Candidate], Any],
    *,
    out: str | Path,
    trials: int | None = 30,
    seconds: float | None = None,
    sampler: str = "tpe",
    seed: int = 0,
    goal: SearchGoal | None = None,
    fall_from: str | None = None,
    named: Sequence[str] = (),
    grid: Sequence[Mapping[str, Value]] = (),
    report: bool = True,
    stop: bool = True,
    say: Callable[[SearchStep], None] = lambda progress: None,
) -> Found:
    """Looks for the best values of the open places; resumes a study that `out` holds.

    Args:
        recipe: with open places, see eval/search/places.py.
        objective: a judge, or a function of a candidate that gives a number, more is better.
        out: a directory for the study.
        trials: in all, by all processes, without the baselines; None: no limit.
        seconds: for this call.
        sampler: tpe, cmaes, nsga2, random or grid.
        goal: what of the scores is maximised.
        fall_from: the name of the baseline that a constraint refers to; None: the first, the base where there is one.
        named: recipe files to compare with.
        grid: the points of the sampler grid, in order.
        stop: candidates that are clearly worse than the best one so far are stopped early.

    Raises:
        RecipeError: with all problems of the recipe.
        UsageError: what cannot be combined; a study of something else in `out`.
    """
    space = recipe if isinstance(recipe, Space) else Space.load(recipe)
    if not space.places:
        raise UsageError(
            f"{space.file or 'the recipe'}: has no open place. Write for example weight: {{search: [0, 1]}} where a "
            "value would stand."
        )
    judge: Judge = objective if hasattr(objective, "report") else FunctionJudge(objective)  # type: ignore[assignment]
    goal = goal or SearchGoal()
    several = len(goal.names(judge.tasks))
    if several > 1 and sampler == "cmaes":
        raise UsageError("--sampler cmaes: has one objective. Use tpe, nsga2, random or grid for several.")
    Path(out).mkdir(parents=True, exist_ok=True)
    with StudyFile(Path(out), space, sampler, seed, several, grid) as study:
        work = _Search(space, judge, goal, study, seed, trials, seconds, say, stop)
        work.begin(named, fall_from)
        interrupted = work.run()
        return work.finish(interrupted, report)


class _Search:
    """The state of one process of a search."""

    def __init__(
        self,
        space: Space,
        judge: Judge,
        objective: SearchGoal,
        study: StudyFile,
        seed: int,
        trials: int | None,
        seconds: float | None,
        say: Callable[[SearchStep], None],
        stop: bool,
    ) -> None:
        self._space, self._judge, self._objective, self._study = space, judge, objective, study
        self._seed, self._trials, self._seconds, self._say, self._stop = seed, trials, seconds, say, stop
        self._began = time.monotonic()
        self._mine = 0
        self._candidates: dict[str, tuple[str, Candidate]] = {}

    def begin(self, named: Sequence[str], fall_from: str | None) -> None:
        """Scores the baselines, once for all processes; those that a trial could be are the first trials."""
        self._candidates = {each.name: (kind, each) for kind, each in baselines(self._space, named)}
        about = {"recipe": written(self._space.root), "seed": self._seed, "goal": dataclasses.asdict(self._objective)}
        self._study.claim(about | {"fall": fall_from, "baselines": list(self._candidates)} | self._judge.about())
        known = self._study.shared("baselines", self._scored)
        scores = {name: unstored(each) for name, each in known.items()}
        first = next(iter(scores.values()))
        self._objective.check(first)
        self._objective = self._objective.turned(first)
        parents = [scores[name] for name, (kind, _) in self._candidates.items() if kind == PARENT]
        best = {task: max(each[task].signed for each in parents) for task in first}
        if fall_from is not None and fall_from not in scores:
            raise UsageError(f'--fall-from "{fall_from}": is no baseline; there are: {", ".join(scores)}.')
        reference = scores[fall_from] if fall_from is not None else first
        self._objective = dataclasses.replace(
            self._objective, parents=best, reference={task: each.signed for task, each in reference.items()}
        )
        self._study.shared("first trials", lambda: self._first_trials(scores))

    def _scored(self) -> dict[str, Any]:
        found = {}
        for name, (_, candidate) in self._candidates.items():
            began = time.monotonic()
            scores = self._judge.scores(candidate, {})
            found[name] = stored(scores)
            row = SearchRow(name, "baseline", scores, self._objective.values(scores), seconds=time.monotonic() - began)
            self._say(SearchStep(row, None, 0, 0, self._trials, time.monotonic() - self._began))
        return found

    def _first_trials(self, scores: Mapping[str, Scores]) -> int:
        added = 0
        for name, (kind, candidate) in self._candidates.items():
            if kind == DEFAULT and fits(self._space, candidate.values):
                notes = self._notes(candidate, scores[name])
                self._study.add(name, candidate.values, self._objective.values(scores[name]), notes)
                added += 1
        return added

    def _notes(self, candidate: Candidate, scores: Scores) -> dict[str, Any]:
        notes: dict[str, Any] = {"values": dict(candidate.values), "scores": stored(scores)}
        notes[VIOLATION] = self._objective.violation(scores)
        if candidate.recipe is not None:
            notes["recipe"] = candidate.recipe.text
        return notes

    def run(self) -> bool:
        """Evaluates trials until the budget is used. Returns whether it was interrupted."""
        try:
            while self._seconds is None or time.monotonic() - self._began < self._seconds:
                found = self._study.next(self._trials)
                if found is None:
                    break
                self._one(*found)
            while self._study.others_at_work():
                time.sleep(0.2)
        except KeyboardInterrupt:
            return True
        return False

    def _one(self, trial: Trial, values: Mapping[str, Value]) -> None:
        began = time.monotonic()
        notes: dict[str, Any] = {"values": dict(values)}
        try:
            candidate = Candidate(f"trial {trial.number}", values, self._space.recipe(values))
            candidate.plan  # noqa: B018
        except RecipeError as error:
            self._tell(trial, None, notes | {"refused": str(error)}, began)
            return
        scores, stopped = self._asked(candidate, trial)
        notes |= self._notes(candidate, scores) | stopped
        self._tell(trial, None if stopped else self._objective.values(scores), notes, began)

    def _tell(self, trial: Trial, values: Sequence[float] | None, notes: dict[str, Any], began: float) -> None:
        self._study.tell(trial, values, notes | {"seconds": time.monotonic() - began})
        self._mine += 1
        rows = self.rows()
        done = sum(row.kind == "trial" for row in rows)
        mine = next(row for row in rows if row.number == trial.number)
        self._say(SearchStep(mine, self.best(rows), done, self._mine, self._trials, time.monotonic() - self._began))

    def _asked(self, candidate: Candidate, trial: Trial) -> tuple[Scores, dict[str, Any]]:
        """The scores, and what is to be noted of a candidate that was stopped early."""
        rival = self._rival() if self._stop else None
        if not self._judge.items or rival is None:
            return self._judge.scores(candidate, {}), {}
        rounds = Rounds.of(self._judge.items, f"{self._seed}:{trial.number}")
        scores: dict[str, TaskScore] = {}
        before = 0
        for asked in rounds.stages:
            new = self._judge.scores(candidate, rounds.items(before, asked))
            scores = {task: scores[task].joined(each) if task in scores else each for task, each in new.items()}
            if asked == len(rounds.parts) or not self._judge.items:
                break
            before = asked
            found = duel(self._objective, rounds, scores, rival, asked)
            if found.lost:
                trial.report(found.value, asked)
                return scores, {"stopped": asked, "rounds": len(rounds.parts), "estimate": found.value}
        return scores, {}

    def _rival(self) -> Scores | None:
        """The scores of the best one so far, if it has scores of items and there is one objective."""
        best = self.best(self.rows(), whole=True)
        if best is None or len(best.values) != 1 or not all(score.items for score in best.scores.values()):
            return None
        return best.scores

    def rows(self) -> list[SearchRow]:
        return rows_of(self._study, self._objective, list(self._candidates.values()))

    def best(self, rows: Sequence[SearchRow], whole: bool = False) -> SearchRow | None:
        """The best recipe; `whole`: or parent. Of equals the first."""
        able = [row for row in rows if row.whole and (whole or row.recipe is not None)]
        able = [row for row in able if row.violation <= 0] or ([] if whole else able)
        return max(able, key=lambda row: sum(row.values) / len(row.values), default=None)

    def finish(self, interrupted: bool, report: bool) -> Found:
        rows = self.rows()
        best = self.best(rows)
        front = tuple(row for row in rows if row.whole and row.recipe and not any(o.beats(row) for o in rows))
        results = None
        if report and best is not None:
            assert best.recipe is not None
            chosen = Candidate(CHOSEN, recipe=_parsed(best.recipe))
            with contextlib.suppress(KeyboardInterrupt):
                results = self._judge.report([*(each for _, each in self._candidates.values()), chosen])
        return Found(self._space, self._objective, self._judge.tasks, tuple(rows), best, front, results, interrupted)


def _parsed(text: str) -> Any:
    from merge import parse_recipe

    try:
        return parse_recipe(text)
    except RecipeError as error:  # of our own making
        raise MergeError(f"the best recipe cannot be read again: {error}") from error
