"""merge soup: Average the models that improve the average (a greedy soup)."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import TYPE_CHECKING

import click

from merge.cli.judging import check_files, judging, judging_options, write_text
from merge.cli.options import PATH, html_option, json_flag, trust_option
from merge.errors import UsageError
from merge.output.directory import check_out

if TYPE_CHECKING:
    from eval.soup import Soup


@click.command(
    "soup",
    epilog="""\b
Examples:
  merge soup run-1 run-2 run-3 --suite quickstart -o merged/soup
  merge soup run-* --tasks arc_easy --holdout 0.3
Greedy: sorted by score, each model is added if the average does not get worse. The choice uses some of the items
(--holdout), the reported scores the others.""",
)
@click.argument("models", metavar="MODEL...", nargs=-1, required=True)
@click.option("-o", "--out", type=PATH, help="Directory for the soup.  [default: not written]")
@click.option(
    "--holdout",
    type=click.FloatRange(0, 1, min_open=True, max_open=True),
    default=0.5,
    show_default=True,
    help="Share of the items used to choose.",
)
@html_option
@click.option("--force", is_flag=True, help="Replace an existing result.")
@json_flag("Print the steps and the scores as JSON.")
@judging_options
@trust_option
def command(
    models: tuple[str, ...],
    out: Path | None,
    holdout: float,
    html: Path | None,
    force: bool,
    as_json: bool,
    **asked: object,
) -> None:
    """Average the MODELs that improve the average: directories, hub ids, model+adapter, or recipes."""
    if out is not None:
        check_out(out, force)
    check_files(html=html)
    how = judging(asked)
    from eval.compare import compare
    from eval.models import is_recipe
    from eval.soup import greedy_soup

    if out is not None and how.keep is None and (recipes := [model for model in models if is_recipe(model)]):
        raise UsageError(
            f"--out: the soup must record its inputs, and {', '.join(recipes)} is merged on the fly. Keep "
            "merged models with --keep DIR."
        )
    soup = greedy_soup(models, how.of, how.settings, holdout, out.name if out is not None else "soup", how.keep)
    comparison = compare(soup.report, [soup.report.models[-1].name], [model.name for model in soup.report.models[:-1]])
    if html is not None:
        from eval.html import page

        write_text(html, page(comparison))
    if out is not None:
        from merge import run_plan

        run_plan(soup.plan(), out, force=force)
    if as_json:
        from eval.tables import as_data

        said = {"steps": [dataclasses.asdict(step) for step in soup.steps], "members": soup.members}
        click.echo(json.dumps(said | {"recipe": soup.recipe, "report": as_data(comparison)}, indent=1))
        return
    _print(soup)
    from eval.tables import print_comparison

    click.echo(f"\nOn the other {1 - holdout:.0%} of the items:")
    print_comparison(comparison)
    click.echo(f"\n{soup.recipe}", nl=False)
    for label, file in (("soup", out), ("page", html)):
        if file is not None:
            click.echo(f"{label}: {file}")


def _print(soup: Soup) -> None:
    from rich.table import Table
    from rich.text import Text

    from eval.tables import columns, percent_of, score_table
    from merge.show.terminal import console, show_table

    out = console()
    out.print("On the held-out items, each model by itself:")
    out.print(score_table(soup.singles, out.width))
    table = Table(title="The soup, step by step", title_justify="left")
    heads = [name for name, _ in columns(soup.singles)]
    for head in ("with", *heads, ""):
        table.add_column(Text(head), justify="right" if head in heads else "left")
    percent = percent_of(soup.singles, soup.singles.tasks[0])
    for step in soup.steps:
        values = [*step.scores, step.score] if len(heads) > len(step.scores) else step.scores
        said = [f"{100 * value:.1f}" if percent else f"{value:.4g}" for value in values]
        table.add_row(Text(step.model), *said, "kept" if step.kept else "left out")
    show_table(table, out)
