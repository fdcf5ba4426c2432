"""Results as a table in the terminal: models x tasks, the best of each column in bold."""

from __future__ import annotations

from typing import TYPE_CHECKING

from eval.compare import Gain, gains, parents
from eval.results import Results, TaskResult, Verdicts

if TYPE_CHECKING:
    from rich.text import Text


def print_results(results: Results) -> None:
    """The table, then each merge against its parents, where they were judged too."""
    from rich.table import Table
    from rich.text import Text

    from merge.cli.show import console

    out = console()
    table = Table(title="± standard error; the best of each column is bold", title_justify="left")
    table.add_column("model")
    for name in results.tasks:
        first = results.models[0].tasks[name]
        arrow = "" if first.higher_is_better else " ↓"
        table.add_column(f"{name}\n{first.metric.partition(',')[0]}{arrow}", justify="right")
    average = _has_average(results)
    if average:
        table.add_column("average", justify="right")
    best = {name: _best(results, name) for name in results.tasks}
    top = max((_average(results, model) for model in results.models), default=0.0) if average else 0.0
    for model in results.models:
        cells = [_cell(model.tasks[name], model.tasks[name].value == best[name]) for name in results.tasks]
        if average:
            mean = _average(results, model)
            cells.append(Text(f"{100 * mean:.1f}", style="bold" if mean == top else ""))
        table.add_row(Text(model.name), *cells)
    out.print(table)
    for model in results.models:
        asked = f"{model.asked:,} requests in {model.seconds:.1f} s"
        out.print(f"{model.name}: {asked}, {model.remembered:,} remembered")
        for gain in gains(results, model, rivals) if (rivals := parents(results, model)) else ():
            out.print("  " + gain_text(gain, model.tasks[gain.task]))


def gain_text(gain: Gain, task: TaskResult) -> str:
    """One line: task, gain over the best parent with its interval, and over the mean of the parents."""
    percent = is_share(task)
    best = gain.best
    text = f"{gain.task}: {_signed(best.value, percent)} against the best parent ({best.other})"
    if best.low is not None and best.high is not None and best.p is not None:
        interval = f"95 % {_signed(best.low, percent)} to {_signed(best.high, percent)}"
        text += f", {interval}, p = {best.p:.2g}, {best.gained} items gained, {best.lost} lost"
    return text + f"; {_signed(gain.over_mean, percent)} over the mean of the parents"


def _signed(value: float, percent: bool) -> str:
    return f"{100 * value:+.1f}" if percent else f"{value:+.4g}"


def is_share(task: TaskResult) -> bool:
    """Whether a score is a share of 1, shown in percent."""
    return task.higher_is_better and 0.0 <= task.value <= 1.0


def _cell(task: TaskResult, best: bool) -> Text:
    from rich.text import Text

    error = task.error
    if is_share(task):
        text = f"{100 * task.value:.1f}" + (f" ± {100 * error:.1f}" if error is not None else "")
    else:
        text = f"{task.value:.4g}" + (f" ± {error:.2g}" if error is not None else "")
    return Text(text, style="bold" if best else "")


def _best(results: Results, name: str) -> float:
    values = [model.tasks[name].value for model in results.models]
    return max(values) if results.models[0].tasks[name].higher_is_better else min(values)


def _has_average(results: Results) -> bool:
    return len(results.tasks) > 1 and all(
        is_share(model.tasks[name]) for model in results.models for name in results.tasks
    )


def _average(results: Results, model: Verdicts) -> float:
    """Mean of the tasks' scores, each counting the same."""
    return sum(model.tasks[name].value for name in results.tasks) / len(results.tasks)
