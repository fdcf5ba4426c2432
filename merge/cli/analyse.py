"""merge analyse: Look at fine-tunes before they are merged: conflicts, ranks, what to try."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import click

from merge.cli.judging import check_files, write_text
from merge.cli.options import PATH, html_option, json_flag, quiet_option, threads_option
from merge.show.terminal import progress_bar, show_notes


@click.command(
    "analyse",
    epilog="""\b
Examples:
  merge analyse org/base org/math org/code
  merge analyse base math code law --html page.html --csv measures.csv
  merge analyse base math code --recipe suggested.yaml && merge run suggested.yaml -o merged/suggested""",
)
@click.argument("base")
@click.argument("models", nargs=-1, required=True)
@click.option("--recipe", type=PATH, help="Write the suggestion as a recipe.")
@click.option("--csv", "csv_file", type=PATH, help="Write every measure of every tensor as CSV.")
@html_option
@click.option(
    "--matrices",
    type=click.IntRange(0),
    default=160,
    show_default=True,
    help="Matrices whose singular values are computed.",
)
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True, help="Of the random vectors for these.")
@threads_option
@quiet_option
@json_flag("Print everything, tensor by tensor, as JSON.")
def command(
    base: str,
    models: tuple[str, ...],
    recipe: Path | None,
    csv_file: Path | None,
    html: Path | None,
    matrices: int,
    seed: int,
    threads: int | None,
    quiet: bool,
    as_json: bool,
) -> None:
    """Measure how MODELS, fine-tunes of BASE, differ from it and from each other, and suggest how to merge them."""
    from merge.adapters.fold import open_model
    from merge.errors import UsageError
    from merge.recipe import parse_reference
    from merge.show.analysis import print_analysis
    from merge.tools.analyse import analyse
    from merge.tools.analyse.tables import as_csv, as_data

    check_files(recipe=recipe, csv=csv_file, html=html)
    try:
        first, *refs = [parse_reference(text) for text in (base, *models)]
    except ValueError as error:
        raise UsageError(f"{error}.") from None
    total = sum(tensor.nbytes for ref in (first, *refs) for tensor in open_model(ref).tensors.values())
    with progress_bar("analyse", total, quiet or not sys.stderr.isatty()) as bar:

        def progress(done: int, work: int) -> None:
            bar(total * done // max(1, work))

        analysis = analyse(first, refs, matrices=matrices, seed=seed, threads=threads, progress=progress)
    show_notes(analysis.notes, quiet)
    if as_json:
        click.echo(json.dumps(as_data(analysis), ensure_ascii=False))
    else:
        print_analysis(analysis)
    if csv_file is not None:
        write_text(csv_file, as_csv(analysis))
    if html is not None:
        from merge.show.analysis_page import analysis_page

        write_text(html, analysis_page(analysis))
    if recipe is not None:
        _write_recipe(recipe, analysis.recipe)


def _write_recipe(path: Path, text: str | None) -> None:
    from merge.errors import MergeError

    if text is None:
        raise MergeError(f"--recipe {path}: not written, as no merge of these models is suggested; see above why.")
    write_text(path, text)
