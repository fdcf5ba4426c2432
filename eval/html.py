"""A comparison as one HTML page: no scripts, nothing fetched, the same bytes for the same results.

The page's style is merge/show/page.html, its plots are eval/plots.py. Beside every plot there is a table with its
numbers.
"""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from eval import agreement, plots
from eval.compare import Comparison, Merged, average, average_error, averaged
from eval.difference import AVERAGE, Difference
from eval.path import barrier, barrier_text
from eval.results import ModelScores, Results
from eval.tables import (
    Cell,
    cell,
    cells,
    columns,
    errors_legend,
    interval,
    notes,
    p_text,
    percent_of,
    signed,
    verdict,
)
from merge.schema.names import one_of
from merge.show.page import html_document, html_figure, html_row, html_table

_EXAMPLES = 6  # of each kind and task


def page(comparison: Comparison) -> str:
    """The whole page."""
    parts = [_head(comparison), _scores(comparison)]
    if comparison.results.path:
        parts.append(_path(comparison.results))
    else:
        parts.append(_bars(comparison))
    for merged in comparison.merges:
        parts += [_gains(comparison, merged), _agreement(comparison, merged)]
    parts.append(_models(comparison.results))
    return html_document(_title(comparison), parts)


def _title(comparison: Comparison) -> str:
    models = comparison.results.models
    if comparison.results.path:
        return f"From {models[0].name} to {models[-1].name}"
    if not comparison.merges:
        return f"{len(models)} models on {', '.join(comparison.results.tasks)}"
    names = [merged.model.name for merged in comparison.merges]
    return f"{one_of(names, 'and')} against {'its' if len(names) == 1 else 'their'} parents"


def _head(comparison: Comparison) -> str:
    results = comparison.results
    parts = [f"<h1>{escape(_title(comparison))}</h1>"]
    parts += [f'<p class="lead">{escape(verdict(results, merged))}</p>' for merged in comparison.merges]
    n = sum(results.models[0].tasks[name].n for name in results.tasks)
    how = f"{n:,} items, the same for all models"
    how += f", with lm-eval {results.versions.get('lm_eval', '?')}"
    parts.append(f'<p class="soft">{escape(how)}.</p>')
    return "\n".join(parts)


def _scores(comparison: Comparison) -> str:
    said = "".join(f'<p class="soft">{escape(note)}</p>' for note in notes(comparison))
    return "<h2>Scores</h2>" + html_scores(comparison) + said


def html_scores(comparison: Comparison) -> str:
    """The table of models and tasks."""
    results = comparison.results
    heads = [escape(name) + (f'<br><span class="soft">{escape(m)}</span>' if m else "") for name, m in columns(results)]
    rows = [
        html_row(model.name, [_score(cell) for cell in row], comparison.merged(model) is not None)
        for model, row in zip(results.models, cells(results), strict=True)
    ]
    caption = f"{errors_legend(results)}. The best of each column is bold; ↓ means that less is better."
    return html_table(["model", *heads], rows, caption)


def _score(cell: Cell) -> str:
    return f"<b>{cell}</b>" if cell.best else str(cell)


def _role(comparison: Comparison, model: ModelScores) -> str:
    if comparison.merged(model):
        return "merge"
    return "parent" if model in _parents(comparison) or not comparison.merges else "other"


def _parents(comparison: Comparison) -> list[ModelScores]:
    return [parent for merged in comparison.merges for parent in merged.parents]


def _bars(comparison: Comparison) -> str:
    results = comparison.results
    figures = []
    if averaged(results):
        rows = [
            _bar(comparison, model, Cell(average(results, model), average_error(results, model), True))
            for model in results.models
        ]
        figures.append(html_figure(AVERAGE, plots.bars(rows, "Average of the tasks for each model", 1.0)))
    for name, metric in columns(results):
        if name == AVERAGE:
            continue
        percent = percent_of(results, name)
        rows = [_bar(comparison, model, cell(model.tasks[name])) for model in results.models]
        plot = plots.bars(rows, f"{name}, {metric}, for each model", 1.0 if percent else None)
        figures.append(html_figure(name, plot, metric))
    key = ""
    if comparison.merges:
        names = [merged.model.name for merged in comparison.merges]
        roles = [("merge", one_of(names, "and")), ("parent", "its parents" if len(names) == 1 else "their parents")]
        roles += [("other", "others")] if any(_role(comparison, m) == "other" for m in results.models) else []
        key = "".join(f'<span><i style="background:var(--{role})"></i>{escape(t)}</span>' for role, t in roles)
        key = f'<p class="key soft">{key}</p>'
    return f'<h2>By task</h2>{key}<div class="grid">{"".join(figures)}</div>'


def _bar(comparison: Comparison, model: ModelScores, score: Cell) -> plots.Bar:
    error = score.error or 0.0
    ends = score.span or (score.value - error, score.value + error)
    return plots.Bar(model.name, score.value, ends, str(score), _role(comparison, model))


def _gains(comparison: Comparison, merged: Merged) -> str:
    figures = []
    for percent in (True, False):
        chosen = [gain for gain in merged.gains if percent_of(comparison.results, gain.task) == percent]
        if chosen:
            rows = [html_interval(gain.task, gain.best.value, gain.low, gain.high, gain.significant) for gain in chosen]
            unit = "percentage points" if percent else "in the task's unit"
            plot = plots.intervals(rows, "Gain over the best parent of each task", percent)
            figures.append(html_figure("Against the best parent of each task", plot, unit))
    last = merged.gains[-1]
    if len(merged.parents) > 1:
        where = "On average" if last.task == AVERAGE else f"On {last.task}"
        rows = [html_interval(each.other, each.value, each.low, each.high, each.significant) for each in last.each]
        plot = plots.intervals(rows, f"{where}, against each parent", percent_of(comparison.results, last.task))
        figures.append(html_figure(f"{where}, against each parent", plot))
    note = (
        "Lines are 95 % intervals, from random halves of the items that all models answered. Filled points are "
        "significant at 5 %, corrected for having looked at several parents, tasks and merges. They say how sure the "
        "difference is on such items, not how a second training would come out."
    )
    rows_of_table = [
        _gain_row(each, comparison.results, gain.over_mean if each is gain.best else None)
        for gain in merged.gains
        for each in gain.each
    ]
    heads = ["task", "against", "gain", "95 % interval", "p", "p among parents", "gained", "lost"]
    heads.append("over the parents’ mean")
    table = html_table(
        heads, rows_of_table, "Items gained are those that the merge gets right and the parent does not."
    )
    return (
        f'<h2>{_of("Gains", comparison, merged)}</h2><p class="soft">{note}</p>'
        f'<div class="grid">{"".join(figures)}</div>'
        f"<details><summary>All gains as a table</summary>{table}</details>"
    )


def html_interval(name: str, value: float, low: float | None, high: float | None, significant: bool) -> plots.Interval:
    role = "even" if not significant else "gain" if value > 0 else "loss"
    return plots.Interval(name, value, low, high, role)


def _gain_row(one: Difference, results: Results, over_mean: float | None) -> str:
    percent = percent_of(results, one.task)
    mean = "" if over_mean is None else signed(over_mean, percent)
    gain = f'<span class="{"up" if one.value > 0 else "down"}">{signed(one.value, percent)}</span>'
    tested = [interval(one.low, one.high, percent), p_text(one.p), p_text(one.p_among)]
    return html_row(one.task, [escape(one.other), gain, *tested, str(one.gained), str(one.lost), mean])


def _of(head: str, comparison: Comparison, merged: Merged) -> str:
    """The heading, with the merge's name if there are several merges."""
    return head if len(comparison.merges) == 1 else f"{head} of {escape(merged.model.name)}"


def _agreement(comparison: Comparison, merged: Merged) -> str:
    """Agreement item by item, for tasks whose items are right or wrong."""
    sections = []
    questions = comparison.results.questions
    for grid in agreement.grids(merged, comparison.results.tasks):
        rows = [(row.model, row.right, row.role) for row in grid.rows]
        plot = plots.strips(rows, f"{grid.name}: which items each model gets right")
        counts = [
            html_row(
                c.parent,
                [
                    str(c.both),
                    f'<span class="up">{c.gained}</span>',
                    f'<span class="down">{c.lost}</span>',
                    str(c.neither),
                ],
            )
            for c in grid.counts
        ]
        table = html_table(["against", "both right", "gained", "lost", "both wrong"], counts)
        figure = html_figure(f"{len(grid.rows[0].right):,} items", plot)
        examples = "".join(
            _examples(
                f"Items {kind} against {grid.rival}", agreement.examples(merged, questions, grid, kind, _EXAMPLES), grid
            )
            for kind in ("gained", "lost")
        )
        sections.append(f'<h3>{escape(grid.name)}</h3><div class="beside">{figure}<div>{table}{examples}</div></div>')
    if not sections:
        return ""
    note = (
        "Each column is an item, filled where the model is right. Items stand in one order for all models: first those "
        "that the merge gets right."
    )
    return f'<h2>{_of("Item by item", comparison, merged)}</h2><p class="soft">{note}</p>' + "\n".join(sections)


def _examples(title: str, found: Sequence[agreement.AgreementExample], grid: agreement.Grid) -> str:
    if not found:
        return ""
    heads = ["question", "right answer", *(escape(row.model) for row in grid.rows)]
    rows = []
    for example in found:
        answers = [
            f'<td class="wrap"><span class="{"up" if right else "down"}">{"✓" if right else "✗"}</span> '
            f"{escape(text)}</td>"
            for right, text in example.answers
        ]
        question = f'<td class="wrap">{escape(example.question)}</td><td class="wrap">{escape(example.target)}</td>'
        rows.append(f"<tr>{question}{''.join(answers)}</tr>")
    return f'<details class="examples"><summary>{escape(title)}</summary>{html_table(heads, rows)}</details>'


def _path(results: Results) -> str:
    ends = (results.models[0].name, results.models[-1].name)
    figures, said = [], []
    for task, metric in columns(results):
        if task == AVERAGE:
            continue
        found = barrier(results, task)
        said.append(f"<li>{escape(barrier_text(found, ends))}</li>")
        values = [model.tasks[task].value for model in results.models]
        plot = plots.line(results.path, values, ends, f"{task} along the path", found.percent)
        figures.append(html_figure(task, plot, metric))
    note = (
        "Weights are interpolated linearly, t from 0 to 1; the dashed line joins the ends. The barrier is the largest "
        "excess of the loss over that line: 0 if the models are in one basin."
    )
    return (
        f'<h2>Along the path</h2><p class="soft">{note}</p><ul>{"".join(said)}</ul>'
        f'<div class="grid">{"".join(figures)}</div>'
    )


def _models(results: Results) -> str:
    rows = [html_row(model.name, [f"<code>{escape(model.digest)}</code>"]) for model in results.models]
    said = [f"{key} {value}" for key, value in results.settings.items() if value and key in _SAID]
    settings = f'<p class="soft">Settings: {escape(", ".join(said))}.</p>' if said else ""
    versions = ", ".join(f"{name} {version}" for name, version in results.versions.items())
    table = html_table(["model", '<span class="left">digest of weights, config and tokenizer</span>'], rows)
    return f'<h2>Models</h2>{table}{settings}<p class="soft">{escape(versions)}.</p>'


_SAID = ("backend", "dtype", "device", "limit", "seed", "num_fewshot", "chat_template", "system_instruction", "holdout")
