"""A search as one HTML page: report, history, Pareto front, importance, slices. No scripts, nothing fetched."""

from __future__ import annotations

from html import escape

from eval import plots
from eval.html import html_interval, html_scores
from eval.search.places import OpenPlace
from eval.search.record import SearchRow
from eval.search.report import comparisons, verdicts
from eval.search.run import Found
from eval.search.scatter import Mark, scatter
from eval.tables import percent_of
from merge.show.page import html_document, html_figure, html_row, html_table

_MOST_ROWS = 200
_STATES = {"whole": "merge", "stopped": "other", "baseline": "parent"}


def page(found: Found) -> str:
    """The whole page."""
    title = f"Search over {found.space.file or 'a recipe'}"
    body = [f"<h1>{escape(title)}</h1>", _lead(found), _report(found), _history(found), _front(found)]
    body += [_importance(found), _slices(found), _trials(found), _best(found)]
    return html_document(title, body)


def _lead(found: Found) -> str:
    said = [f'<p class="lead">{escape(text)}.</p>' for text in verdicts(found)]
    stopped = sum(row.state == "stopped" for row in found.rows)
    refused = sum(row.state == "refused" for row in found.rows)
    text = f"{found.n_trials} trials, of which {stopped} were stopped early and {refused} could not be carried out. "
    text += f"Objective: {', '.join(found.objective.names(found.tasks))} of {', '.join(found.tasks)}."
    if found.test_sets:
        text += f" Chosen on test sets of leaderboards: {', '.join(found.test_sets)}."
    return "".join(said) + f'<p class="soft">{escape(text)}</p>'


def _report(found: Found) -> str:
    made = comparisons(found)
    if not made:
        return ""
    figures = []
    for label, comparison in made:
        gain = comparison.merges[0].gains[-1]
        rows = [html_interval(each.other, each.value, each.low, each.high, each.significant) for each in gain.each]
        percent = percent_of(comparison.results, gain.task)
        plot = plots.intervals(rows, f"Gain of the best recipe over {label}", percent)
        figures.append(html_figure(f"Against {label}", plot, gain.task))
    note = "On items that no choice has seen: all models answered the same ones. Lines are 95 % intervals."
    table = html_scores(made[0][1])
    return f'<h2>Report</h2><p class="soft">{note}</p><div class="grid">{"".join(figures)}</div>{table}'


def _whole(found: Found) -> list[SearchRow]:
    return [row for row in found.rows if row.kind == "trial" and row.state in ("whole", "stopped") and row.values]


def _history(found: Found) -> str:
    """Values in the order of the trials, with the best so far, and lines at the best parent and default."""
    names = found.objective.names(found.tasks)
    figures = []
    for place, name in enumerate(names):
        marks, curve, best = [], [], float("-inf")
        for row in _whole(found):
            if place >= len(row.values):
                continue
            value = row.values[place]
            marks.append(Mark(row.number or 0, value, _STATES[row.state], row.name))
            best = max(best, value) if row.whole and row.violation <= 0 else best
            if best > float("-inf"):
                curve.append((float(row.number or 0), best))
        if not marks:
            continue
        levels = [
            (max(row.values[place] for row in chosen), f"best {kind}")
            for kind in ("parent", "default")
            if (chosen := [row for row in found.rows if row.kind == kind])
        ]
        plot = scatter(marks, "trial", name, f"{name} of each trial", curve=curve, levels=levels)
        figures.append(html_figure(name, plot))
    key = '<p class="key soft"><span><i style="background:var(--merge)"></i>all items</span>'
    key += '<span><i style="background:var(--other)"></i>stopped early, estimated</span></p>'
    return f'<h2>History</h2>{key}<div class="grid">{"".join(figures)}</div>' if figures else ""


def _front(found: Found) -> str:
    names = found.objective.names(found.tasks)
    if len(names) < 2:
        return ""
    figures = []
    chosen = {row.name for row in found.front}
    for second in range(1, len(names)):
        marks = [
            Mark(row.values[0], row.values[second], "merge" if row.name in chosen else "other", row.name)
            for row in found.rows
            if row.whole and row.recipe
        ]
        curve = sorted((row.values[0], row.values[second]) for row in found.front) if len(names) == 2 else []
        plot = scatter(marks, names[0], names[second], f"{names[second]} over {names[0]}", curve=curve)
        figures.append(html_figure(f"{names[second]} over {names[0]}", plot))
    note = "Filled points are beaten by no other recipe in all objectives at once."
    return f'<h2>Pareto front</h2><p class="soft">{note}</p><div class="grid">{"".join(figures)}</div>'


def _importance(found: Found) -> str:
    if len(found.importance) < 2:
        return ""
    rows = [plots.Bar(name, share, (share, share), f"{share:.0%}", "merge") for name, share in found.importance.items()]
    note = (
        "The share of the spread of values between good trials and all trials that each place accounts for (PED-ANOVA, "
        "Watanabe et al. 2023). With few trials it says little."
    )
    plot = plots.bars(rows, "Importance of each open place", 1.0)
    return f'<h2>Importance</h2><p class="soft">{note}</p><div class="grid">{html_figure("Open places", plot)}</div>'


def _slices(found: Found) -> str:
    """The value over each place."""
    figures = []
    for place in found.space.places:
        marks = [
            Mark(_along(place, row), row.values[0], _STATES[row.state], row.name)
            for row in _whole(found)
            if place.name in row.written
        ]
        if marks:
            words = [str(choice) for choice in place.choices]
            plot = scatter(
                marks, place.name, "value", f"value over {place.name}", words=words, log=place.log and not words
            )
            figures.append(html_figure(place.name, plot))
    return f'<h2>Slices</h2><div class="grid">{"".join(figures)}</div>' if figures else ""


def _along(place: OpenPlace, row: SearchRow) -> float:
    value = row.written[place.name]
    return float(place.choices.index(value)) if place.kind == "choice" else float(value or 0)


def _trials(found: Found) -> str:
    """The table: baselines, and the best trials first."""
    names = found.objective.names(found.tasks)
    baselines = [row for row in found.rows if row.kind != "trial"]
    trials = sorted(
        (row for row in found.rows if row.kind == "trial" and row.state != "running"),
        key=lambda row: (not row.whole, -sum(row.values)),
    )
    rows = []
    for row in [*baselines, *trials[:_MOST_ROWS]]:
        values = [f"{value:.4g}" for value in row.values] or [""] * len(names)
        values = values if len(values) == len(names) else [*values, *[""] * (len(names) - len(values))]
        tasks = [f"{row.scores[task].value:.4g}" if task in row.scores else "" for task in found.tasks]
        state = f"stopped after {row.asked} of {row.rounds} rounds" if row.state == "stopped" else row.state
        places = ", ".join(
            f"{name} {value:.4g}" if isinstance(value, float) else f"{name} {value}"
            for name, value in row.written.items()
        )
        cells = [
            *values,
            *tasks,
            escape(state if not row.refused else row.refused),
            f'<span class="left">{escape(places)}</span>',
        ]
        rows.append(html_row(row.name, cells, found.best is not None and row.name == found.best.name))
    heads = ["recipe", *map(escape, names), *map(escape, found.tasks), "state", '<span class="left">open places</span>']
    caption = "Scores on the items of the search, of those stopped early on the items that they were asked."
    table = html_table(heads, rows, caption)
    return f"<h2>Trials</h2><details open><summary>Baselines and trials, the best first</summary>{table}</details>"


def _best(found: Found) -> str:
    return f"<h2>The best recipe</h2><pre>{escape(found.recipe)}</pre>" if found.recipe else ""
