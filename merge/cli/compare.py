"""merge compare: Compare a merge with its parents: tables, a page, model cards."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import TYPE_CHECKING

import click
from click.core import ParameterSource

from merge.cli.judging import check_files, judging, judging_options, write_text
from merge.cli.options import PATH, html_option, json_flag, trust_option
from merge.errors import UsageError

if TYPE_CHECKING:
    from eval.compare import Comparison
    from eval.gate import Gate
    from eval.results import Results


@click.command(
    "compare",
    epilog="""\b
Examples:
  merge compare results.json                              of merge eval -o results.json
  merge compare monday.json tuesday.json --merge mine --parents math,code
  merge compare base math code merged --suite quickstart --html page.html
  merge compare results.json --card merged/mine
  merge compare results.json --gate --gate-against base   for scripts: exit code 1 unless it passes
Saved results are compared as they are; models are evaluated first, with the options of merge eval.""",
)
@click.argument("sources", metavar="RESULTS.json...|MODEL...", nargs=-1, required=True)
@click.option(
    "--merge", "merge", help="The merges to compare, separated by commas.  [default: all whose parents are given]"
)
@click.option("--parents", help="The models to compare with, separated by commas.  [default: those it was made of]")
@click.option("--csv", "csv_file", type=PATH, help="Write the table as CSV.")
@click.option("--markdown", type=PATH, help="Write it as Markdown.")
@html_option
@click.option("--card", type=PATH, help="Add the table to the model card of this directory.")
@click.option("-o", "--out", type=PATH, help="File for the results.")
@click.option("--gate", is_flag=True, help="Exit with 1 unless the mean rises and no task falls significantly.")
@click.option("--gate-against", metavar="NAME", help="The model to replace.  [default: the best parent on average]")
@json_flag("Print the comparison as JSON.")
@judging_options
@trust_option
def command(
    sources: tuple[str, ...],
    merge: str | None,
    parents: str | None,
    csv_file: Path | None,
    markdown: Path | None,
    html: Path | None,
    card: Path | None,
    out: Path | None,
    gate: bool,
    gate_against: str | None,
    as_json: bool,
    **asked: object,
) -> None:
    """Compare merges with their parents on the same items: scores, gains, and their uncertainty."""
    from eval import tables
    from eval.compare import compare

    if gate_against is not None and not gate:
        raise UsageError("--gate-against: give --gate too.")
    check_files(csv=csv_file, markdown=markdown, html=html, out=out)
    if card is not None and not card.is_dir():
        raise UsageError(f"--card {card}: there is no such directory.")
    results = _results(sources, asked)
    if out is not None:
        write_text(out, results.to_json())
    comparison = compare(results, names_of(merge), names_of(parents))
    gates = _gates(comparison, gate_against) if gate else ()
    if csv_file is not None:
        write_text(csv_file, tables.as_csv(comparison))
    if markdown is not None:
        write_text(markdown, tables.as_markdown(comparison))
    if html is not None:
        from eval.html import page

        write_text(html, page(comparison))
    if card is not None:
        from eval.card import write_card

        card = write_card(card, comparison)
    if as_json:
        said = tables.as_data(comparison)
        if gate:
            said["gates"] = [dataclasses.asdict(each) | {"passed": each.passed} for each in gates]
        click.echo(json.dumps(said, indent=1, ensure_ascii=False))
    else:
        _print(comparison)
        for label, file in (
            ("results", out),
            ("csv", csv_file),
            ("markdown", markdown),
            ("card", card),
            ("page", html),
        ):
            if file is not None:
                click.echo(f"{label}: {file}")
        for each in gates:
            click.echo(str(each))
    if not all(each.passed for each in gates):
        click.get_current_context().exit(1)


def _print(comparison: Comparison) -> None:
    from eval import tables

    results = comparison.results
    if results.path and not comparison.merges:
        from eval.path import print_path

        print_path(results)
    else:
        tables.print_comparison(comparison)


def _gates(comparison: Comparison, against: str | None) -> tuple[Gate, ...]:
    from eval.gate import gates

    return gates(comparison, against)


def names_of(text: str | None) -> list[str]:
    return [name.strip() for name in (text or "").split(",") if name.strip()]


def _results(sources: tuple[str, ...], asked: dict[str, object]) -> Results:
    """The saved results, or those of evaluating the models."""
    saved = [source for source in sources if source.endswith(".json")]
    if not saved:
        return judging(asked).judge(sources)
    if len(saved) < len(sources):
        models = ", ".join(source for source in sources if source not in saved)
        raise UsageError(f"results and models at once ({models}): name files of merge eval -o, or models.")
    context = click.get_current_context()
    given = [name for name in asked if context.get_parameter_source(name) is ParameterSource.COMMANDLINE]
    if unread := [f"--{name.replace('_', '-')}" for name in given if name != "quiet"]:
        raise UsageError(
            f"{', '.join(unread)}: saved results are compared as they are. Run merge eval with it instead."
        )
    from eval.join import join
    from eval.results_file import load_results

    results, notes = join([(Path(source), load_results(Path(source))) for source in saved])
    for note in notes:
        click.echo(f"note: {note}", err=True)
    return results
