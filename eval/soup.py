"""Greedy soup: adds models to an average as long as it does not get worse on held-out items.

Wortsman et al. 2022, Model soups (arXiv:2203.05482), Recipe 1: sort the models by held-out score, start with the best,
add each if the average with it scores at least as well. Members chosen on some items look better on them than they are,
so the items are split: one part for choosing, the other for the report.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from eval.blends import blend, blend_recipe, on_disk
from eval.compare import in_percent
from eval.models import Subject, is_recipe, weights_of
from eval.results import ModelScores, Results
from eval.settings import Settings
from merge.errors import SourceChanged, UsageError
from merge.plan import Plan, SourceFile
from merge.recipe.model import Recipe
from merge.recipe.text import text_of

Judge = Callable[[Sequence[Subject], Settings], Results]


@dataclass(frozen=True)
class SoupStep:
    """One model that was tried: the held-out scores of the soup with it, and whether it was kept.

    Attributes:
        scores: of each task.
        score: their mean, which decides; negated if less is better.
    """

    model: str
    scores: tuple[float, ...]
    score: float
    kept: bool


@dataclass(frozen=True)
class Soup:
    """
    Attributes:
        singles: the models on the held-out items, in the order they were named.
        steps: in the order they were tried; the first is the best model by itself.
        members: the models of the soup, as they were named.
        average: its recipe; where members are to be made first, its text says so.
        report: soup and models on the other items.
        files: the models' weight files, as they were before the first was judged.
    """

    singles: Results
    steps: tuple[SoupStep, ...]
    members: tuple[str, ...]
    average: Recipe
    report: Results
    files: tuple[SourceFile, ...]

    @property
    def recipe(self) -> str:
        """The text of its recipe."""
        return self.average.text + text_of(self.average)

    def plan(self) -> Plan:
        """The recipe's plan. Raises SourceChanged if a member has changed since it was judged."""
        from merge import build_plan
        from merge.planning.resolve import made_recipe

        plan = build_plan(made_recipe(self.average))
        for file in (file for model in plan.models for file in model.files):
            if file not in self.files:
                raise SourceChanged(f"{file.path}: changed since the models were judged. Run again.")
        return plan


def greedy_soup(
    models: Sequence[str],
    judge: Judge,
    settings: Settings,
    holdout: float,
    name: str = "soup",
    keep: Path | None = None,
) -> Soup:
    """Chooses the members on one part of the items, and reports on the other.

    Args:
        judge: evaluates subjects.
        holdout: the share of the items to choose on; the soup is reported on the others.
        keep: where models stay that are recipes.

    Raises:
        UsageError: fewer than two models; tasks whose scores have no common scale.
    """
    if len(models) < 2:
        raise UsageError("merge soup: expected at least two models.")
    choose = dataclasses.replace(settings, holdout=holdout, held_out=True)
    rest = dataclasses.replace(settings, holdout=holdout, held_out=False)
    with on_disk(models, "merge soup", keep) as single:
        files = tuple(file for subject in single for file in weights_of(subject))
        singles = judge(single, choose)
        _check_scale(singles)
        scores = [_score(singles, model) for model in singles.models]
        order = sorted(range(len(models)), key=lambda place: -scores[place])  # stable: among equals, the first named
        members, best = [order[0]], scores[order[0]]
        steps = [_step(singles, singles.models[order[0]], single[order[0]].name, best, True)]
        for place in order[1:]:
            found = judge([_blend([single[m] for m in (*members, place)], f"{name} + {single[place].name}")], choose)
            score = _score(found, found.models[0])
            kept = score >= best
            if kept:
                members, best = [*members, place], score
            steps.append(_step(found, found.models[0], single[place].name, score, kept))
        chosen = [single[member] for member in members]
        report = judge([*single, _blend(chosen, name)], rest)
    named = tuple(models[member] for member in members)
    return Soup(singles, tuple(steps), named, _recipe(named, chosen, name, keep), report, files)


def _blend(members: Sequence[Subject], name: str) -> Subject:
    return blend([member.text for member in members], [1.0] * len(members), name)


def _recipe(named: Sequence[str], chosen: Sequence[Subject], name: str, keep: Path | None) -> Recipe:
    """The soup's recipe; members that are recipes themselves, and were not kept, are to be run first."""
    texts, first = [], ""
    for text, subject in zip(named, chosen, strict=True):
        if is_recipe(text) and keep is None:
            first += f"# First: merge run {text} -o merged/{subject.name}\n"
            text = f"merged/{subject.name}"
        texts.append(subject.text if is_recipe(text) else text)
    return dataclasses.replace(blend_recipe(texts, [1.0] * len(texts), name), text=first)


def _step(results: Results, model: ModelScores, name: str, score: float, kept: bool) -> SoupStep:
    return SoupStep(name, tuple(model.tasks[task].value for task in results.tasks), score, kept)


def _check_scale(results: Results) -> None:
    if len(results.tasks) > 1 and not all(in_percent(results, name) for name in results.tasks):
        raise UsageError(
            f"merge soup: the scores of {', '.join(results.tasks)} have no common scale. Name one task, or accuracies."
        )


def _score(results: Results, model: ModelScores) -> float:
    """More is better."""
    scores = [model.tasks[name] for name in results.tasks]
    mean = sum(score.value for score in scores) / len(scores)
    return mean if scores[0].higher_is_better else -mean
