"""merge sweep: Score a recipe at several values of one or two of its parameters."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from merge.cli.judging import check_files, judging, judging_options, write_text
from merge.cli.options import PATH, html_option, trust_option
from merge.errors import UsageError
from merge.needs import need
from merge.show.terminal import printable

if TYPE_CHECKING:
    from eval.search.run import Found, SearchStep


@click.command(
    "sweep",
    epilog="""\b
Examples:
  merge sweep recipes/quickstart.yaml --set weight=.1:.9:9 --suite quickstart --html curve.html
  merge sweep recipe.yaml --set density=.1:1:4 --set lambda=.5,1,1.5 --tasks mine.jsonl --csv map.csv
  merge sweep recipe.yaml --set sort.weight=0:1:5 --data held-out.txt
A name means every value whose path in the recipe ends so. Answers are remembered: a killed command resumes.""",
)
@click.argument("recipe", type=PATH)
@click.option(
    "--set", "texts", multiple=True, required=True, metavar="NAME=LOW:HIGH:N", help="Values to try; twice for a map."
)
@click.option("--csv", "csv_file", type=PATH, help="Write the points as CSV.")
@html_option
@judging_options
@trust_option
def command(recipe: Path, texts: tuple[str, ...], csv_file: Path | None, html: Path | None, **asked: Any) -> None:
    """Score RECIPE at several values of one or two of its parameters: a curve, or a map."""
    from eval.search.asked import judge_of_tasks
    from eval.search.run import search
    from eval.search.sweep import csv, points_of, setting_of, sweep_page, swept

    check_files(csv=csv_file, html=html)
    need("a sweep", "search", "optuna", "cmaes", "lm_eval", "accelerate")
    if len(texts) > 2:
        raise UsageError(f"--set: {len(texts)} were given; a curve has one and a map two. merge search takes more.")
    space = swept(recipe, [setting_of(text) for text in texts])
    grid = points_of(space)
    how = judging(asked)

    def say(step: SearchStep) -> None:
        if asked["quiet"]:
            return
        values = ", ".join(f"{name} {value}" for name, value in step.row.written.items()) or step.row.name
        click.echo(printable(f"{values}: " + (", ".join(f"{v:.4g}" for v in step.row.values) or "refused")), err=True)

    with (
        tempfile.TemporaryDirectory(prefix="merge-sweep-") as work,
        judge_of_tasks(how.tasks, how.settings, how.cache, 1.0, allow_test_set=True) as (judge, _),
    ):
        found = search(
            space, judge, out=work, trials=None, sampler="grid", grid=grid, report=False, stop=False, say=say
        )
    if csv_file is not None:
        write_text(csv_file, csv(found))
    if html is not None:
        write_text(html, sweep_page(found))
    _show(found)
    for label, file in (("csv", csv_file), ("page", html)):
        if file is not None:
            click.echo(f"{label}: {file}")
    if found.interrupted:
        raise KeyboardInterrupt


def _show(found: Found) -> None:
    from rich.table import Table
    from rich.text import Text

    from eval.search.sweep import columns, points
    from merge.show.terminal import console

    said = columns(found)
    table = Table()
    for place in found.space.places:
        table.add_column(Text(place.name), justify="right")
    for name, _ in said:
        table.add_column(Text(name), justify="right")
    for row in points(found):
        numbers = [value(row) for _, value in said]
        values = [str(row.written[place.name]) for place in found.space.places]
        table.add_row(*values, *("refused" if number is None else f"{number:.4g}" for number in numbers))
    console().print(table)
