"""What a search reports: the best recipe against parents and defaults, on items that no choice has seen."""

from __future__ import annotations

from collections.abc import Sequence

from eval.compare import Comparison, compare
from eval.difference import AVERAGE
from eval.results import Results
from eval.search.baselines import DEFAULT, PARENT
from eval.search.record import SearchRow
from eval.search.run import CHOSEN, Found
from eval.tables import interval, p_text, percent_of, signed


def comparisons(found: Found) -> list[tuple[str, Comparison]]:
    """The best against the parents, and against the default recipes, on the items of the report."""
    if found.report is None:
        return []
    made = []
    for kind, label in ((PARENT, "its parents"), (DEFAULT, "the default recipes")):
        names = _names(found.rows, kind, found.report)
        if names:
            made.append((label, compare(found.report, [CHOSEN], names)))
    return made


def _names(rows: Sequence[SearchRow], kind: str, report: Results) -> list[str]:
    known = {model.name for model in report.models}
    return [row.name for row in rows if row.kind == kind and row.name in known]


def verdicts(found: Found) -> list[str]:
    """Whether the best is better than parents and defaults on items that chose nothing, in a sentence each."""
    said = []
    for label, comparison in comparisons(found):
        merged = comparison.merges[0]
        gain = merged.gains[-1]
        percent = percent_of(comparison.results, gain.task)
        where = "on average" if gain.task == AVERAGE else f"on {gain.task}"
        points = " points" if percent else ""
        text = f"{signed(gain.best.value, percent)}{points} {where} against the best of {label}, {gain.best.other}"
        if gain.low is not None:
            text += f" (95 % interval {interval(gain.low, gain.high, percent)}, p {p_text(gain.p)})"
        said.append(text)
    return said
