"""Comparisons as text: a table in the terminal, CSV, Markdown, plain data for JSON, and gains in words."""

from __future__ import annotations

import csv
import dataclasses
import io
from typing import TYPE_CHECKING

from eval.compare import (
    Comparison,
    Gain,
    Merged,
    average,
    average_error,
    averaged,
    compare,
    in_percent,
    is_share,
    parents,
)
from eval.difference import AVERAGE
from eval.results import ModelScores, Results, TaskResult
from merge.quoting import counted

if TYPE_CHECKING:
    from rich.table import Table


@dataclasses.dataclass(frozen=True)
class Cell:
    """A score in tables; shares of 1 are shown in percent.

    Attributes:
        best: of its column.
        span: shown in place of the error where there is one: see TaskResult.span.
    """

    value: float
    error: float | None
    percent: bool
    best: bool = False
    span: tuple[float, float] | None = None

    def __str__(self) -> str:
        if self.percent and self.span:
            return f"{100 * self.value:.1f} ({100 * self.span[0]:.1f}–{100 * self.span[1]:.1f})"
        if self.percent:
            return f"{100 * self.value:.1f}" + (f" ± {100 * self.error:.1f}" if self.error is not None else "")
        return f"{self.value:.4g}" + (f" ± {self.error:.2g}" if self.error is not None else "")


def columns(results: Results) -> list[tuple[str, str]]:
    """(task, metric and number of items) of each column; ↓ where less is better."""
    found = []
    for name in results.tasks:
        first = results.models[0].tasks[name]
        metric = first.metric.partition(",")[0] + ("" if first.higher_is_better else " ↓")
        found.append((name, f"{metric}, n = {first.n:,}" if first.n else metric))
    names = averaged(results)
    return found + ([(AVERAGE, "" if names == results.tasks else f"of {counted(len(names), 'task')}")] if names else [])


def cells(results: Results) -> list[list[Cell]]:
    """A row for each model, in the order of columns()."""
    rows = []
    best = {name: _best(results, name) for name in results.tasks}
    with_average = bool(averaged(results))
    top = max(average(results, model) for model in results.models) if with_average else 0.0
    for model in results.models:
        row = []
        for name in results.tasks:
            task = model.tasks[name]
            row.append(cell(task, best[name]))
        if with_average:
            mean = average(results, model)
            row.append(Cell(mean, average_error(results, model), True, mean == top))
        rows.append(row)
    return rows


def cell(task: TaskResult, best: float | None = None) -> Cell:
    return Cell(task.value, task.error, is_share(task), task.value == best, task.span)


def _best(results: Results, name: str) -> float:
    values = [model.tasks[name].value for model in results.models]
    return max(values) if results.models[0].tasks[name].higher_is_better else min(values)


def score_table(results: Results, width: int) -> Table:
    """Models x tasks; tasks x models if that is wider than the terminal."""
    from rich.table import Table
    from rich.text import Text

    tasks = [f"{name}\n{metric}".rstrip() for name, metric in columns(results)]
    models = [model.name for model in results.models]
    rows = [[Text(str(cell), style="bold" if cell.best else "") for cell in row] for row in cells(results)]
    widest = [
        max(len(line) for text in (head, *(row[place].plain for row in rows)) for line in text.split("\n"))
        for place, head in enumerate(tasks)
    ]
    over, left, heads = "model", models, tasks
    if sum(widest) + 3 * len(tasks) + max(map(len, models)) + 4 > width:
        over, left, heads = "task", [task.replace("\n", ", ") for task in tasks], models
        rows = [list(column) for column in zip(*rows, strict=True)]
    best = "column" if over == "model" else "row"
    table = Table(title=f"{errors_legend(results)}; the best of each {best} is bold", title_justify="left")
    table.add_column(over)
    for head in heads:
        table.add_column(Text(head), justify="right")
    for name, row in zip(left, rows, strict=True):
        table.add_row(Text(name), *row)
    return table


def errors_legend(results: Results) -> str:
    """Legend of the errors beside the scores."""
    spans = any(model.tasks[name].span for model in results.models for name in results.tasks)
    return "± standard error" + ("; in brackets 95 % intervals, where few items are right or wrong" if spans else "")


def notes(comparison: Comparison) -> list[str]:
    """Notes below the tables: on the scores, and on gains without an interval."""
    said = list(comparison.results.notes)
    without: dict[str, dict[str, None]] = {}
    for gain in (gain for merged in comparison.merges for gain in merged.gains):
        if gain.best.why:
            without.setdefault(gain.best.why, {})[gain.task] = None
    return said + [f"No interval for {', '.join(names)}: {why}." for why, names in without.items()]


def print_results(results: Results) -> None:
    """Prints requests and time of each model, the table, and each merge against its judged parents."""
    from merge.show.terminal import console

    out = console()
    for model in results.models:
        asked = f"{counted(model.asked, 'request')} in {model.seconds:.1f} s"
        out.print(f"{model.name}: {asked}, {model.remembered:,} remembered")
    print_comparison(compare(results))


def print_comparison(comparison: Comparison) -> None:
    from merge.show.terminal import console, show_table

    out = console()
    show_table(score_table(comparison.results, out.width), out)
    for merged in comparison.merges:
        out.print(verdict(comparison.results, merged))
        show_table(gain_table(comparison.results, merged), out)
    for note in notes(comparison):
        out.print(note)


def gain_table(results: Results, merged: Merged) -> Table:
    from rich.table import Table
    from rich.text import Text

    title = f"{merged.model.name}: gain over the best parent of each task; items gained and lost against it"
    table = Table(title=Text(title), title_justify="left")
    table.add_column("task")
    for head in GAINS:
        table.add_column(head, justify="right")
    for gain in merged.gains:
        clear = "bold" if gain.significant else ""
        table.add_row(Text(gain.task), *(Text(cell, style=clear) for cell in gain_cells(gain, results)))
    return table


GAINS = ("over the best parent", "95 % interval", "p, corrected", "gained", "lost", "over the parents' mean")


def gain_cells(gain: Gain, results: Results) -> list[str]:
    """The cells for the columns of GAINS."""
    best, percent = gain.best, percent_of(results, gain.task)
    counts = ("–", "–") if best.p is None else (str(best.gained), str(best.lost))
    ahead = f"{signed(best.value, percent)} ({best.other})"
    span = interval(gain.low, gain.high, percent)
    return [ahead, span, p_text(gain.p_adjusted), *counts, signed(gain.over_mean, percent)]


def p_text(p: float | None) -> str:
    return "–" if p is None else f"{p:.2g}"


def verdict(results: Results, merged: Merged) -> str:
    """Whether the merge is better than each of its parents, in one or two sentences."""
    gain = merged.gains[-1]
    best, percent = gain.best, percent_of(results, gain.task)
    where = "on average" if gain.task == AVERAGE else f"on {gain.task}"
    size = shown(abs(best.value), percent)
    name = merged.model.name
    if best.value == 0:
        text = f"{name} scores {where} the same as its best parent, {best.other}"
    else:
        text = f"{name} is {size} {'better' if best.value > 0 else 'worse'} {where} than {best.other}, "
        text += "its best parent" if len(merged.parents) > 1 else "its parent"
    if best.value != 0 and gain.p_adjusted is not None:
        text += f"; the difference is {'' if gain.significant else 'not '}significant"
    text += "."
    if gain.task == AVERAGE:
        above = [each.task for each in merged.gains[:-1] if each.best.value > 0]
        n = len(merged.gains) - 1
        text += f" It is above the best parent of each task on {len(above)} of {n} tasks."
    known = parents(results, merged.model)
    if list(merged.parents) == known and len(known) < len(merged.model.parents):  # none was named by --parents
        text += f" Only {len(known)} of its {len(merged.model.parents)} parents were measured."
    return text


def percent_of(results: Results, task: str) -> bool:
    return task == AVERAGE or in_percent(results, task)


def interval(low: float | None, high: float | None, percent: bool) -> str:
    if low is None or high is None:
        return "–"
    return f"{signed(low, percent)} to {signed(high, percent)}"


def signed(value: float, percent: bool) -> str:
    return f"{round(100 * value, 1) + 0.0:+.1f}" if percent else f"{value + 0.0:+.4g}"  # + 0.0: never -0.0


def shown(value: float, percent: bool) -> str:
    return f"{100 * value:.1f} points" if percent else f"{value:.4g}"


def as_markdown(comparison: Comparison) -> str:
    """The table, and the gains of merges; for a model card."""
    results = comparison.results
    heads = [f"{_md(name)}" + (f" ({_md(metric)})" if metric else "") for name, metric in columns(results)]
    lines = [f"| model | {' | '.join(heads)} |", f"|---|{'---:|' * len(heads)}"]
    for model, row in zip(results.models, cells(results), strict=True):
        shown_cells = [f"**{cell}**" if cell.best else str(cell) for cell in row]
        lines.append(f"| {_md(model.name)} | {' | '.join(shown_cells)} |")
    lines += ["", f"{errors_legend(results)}. The best of each column is bold, ↓ means that less is better."]
    for merged in comparison.merges:
        lines += ["", _md(verdict(results, merged)), "", f"| {_md(merged.model.name)} | {' | '.join(GAINS)} |"]
        lines.append(f"|---|{'---:|' * len(GAINS)}")
        lines += [f"| {_md(gain.task)} | {' | '.join(map(_md, gain_cells(gain, results)))} |" for gain in merged.gains]
    for note in notes(comparison):
        lines += ["", _md(note)]
    return "\n".join(lines) + "\n"


def _md(text: str) -> str:
    for letter in "\\|*_`<[":
        text = text.replace(letter, f"\\{letter}" if letter != "<" else "&lt;")
    return text


def as_csv(comparison: Comparison) -> str:
    """A line for each model and task; cells without a value are empty."""
    file = io.StringIO()
    out = csv.writer(file, lineterminator="\n")
    out.writerow(
        [
            *("model", "digest", "task", "metric", "value", "stderr", "items", "over_best_parent", "best_parent"),
            *("ci_low", "ci_high", "p", "p_corrected", "gained", "lost", "over_parents_mean"),
        ]
    )
    for model in comparison.results.models:
        merged = comparison.merged(model)
        gains = {gain.task: gain for gain in merged.gains} if merged else {}
        for name in comparison.results.tasks:
            task = model.tasks[name]
            start = [model.name, model.digest, name, task.metric, task.value, task.error, task.n]
            out.writerow([*start, *_gain_numbers(gains.get(name))])
    return file.getvalue()


def _gain_numbers(gain: Gain | None) -> list[float | int | str | None]:
    if gain is None:
        return [None] * 9
    best = gain.best
    tested = [gain.low, gain.high, gain.p, gain.p_adjusted]
    return [best.value, best.other, *tested, best.gained, best.lost, gain.over_mean]


def as_data(comparison: Comparison) -> dict[str, object]:
    """For --json: scores, and the merges' gains."""
    results = comparison.results
    models = [
        {"model": model.name, "digest": model.digest, "tasks": _scores(results, model)} for model in results.models
    ]
    if averaged(results):
        for said, model in zip(models, results.models, strict=True):
            said["average"] = {"value": average(results, model), "stderr": average_error(results, model)}
    return {
        "models": models,
        "merges": [_merge(results, each) for each in comparison.merges],
        "notes": notes(comparison),
    }


def _merge(results: Results, merged: Merged) -> dict[str, object]:
    return {
        "merge": merged.model.name,
        "parents": [parent.name for parent in merged.parents],
        "gains": [dataclasses.asdict(gain) for gain in merged.gains],
        "verdict": verdict(results, merged),
    }


def _scores(results: Results, model: ModelScores) -> dict[str, object]:
    def one(task: TaskResult) -> dict[str, object]:
        found = {"metric": task.metric, "value": task.value, "stderr": task.error, "items": task.n}
        return found | ({"interval": task.span} if task.span else {})

    return {name: one(model.tasks[name]) for name in results.tasks}
