"""merge eval: Evaluate models and recipes on the same tasks, through lm-eval."""

from __future__ import annotations

from pathlib import Path

import click

from merge.cli.judging import check_files, judging, judging_options, write_text
from merge.cli.options import PATH, html_option, json_flag, trust_option


@click.command(
    "eval",
    epilog="""\b
Examples:
  merge eval base expert merged --suite quickstart
  merge eval recipe.yaml --tasks arc_easy,hellaswag --limit 200
  merge eval org/model+org/adapter --tasks questions.jsonl -o results.json
  merge eval math code recipe.yaml --suite quickstart --ensemble math,code
  merge eval --path expert-a expert-b --data held-out.txt --html path.html
Answers are remembered by the digest of the weights: a killed command resumes, and another model costs
only that model. Compare saved results with merge compare.""",
)
@click.argument("models", metavar="MODEL...", nargs=-1, required=True)
@click.option(
    "--path", "is_path", is_flag=True, help="Evaluate 11 points between two models, and the barrier between them."
)
@click.option(
    "--ensemble", "ensembles", multiple=True, metavar="A,B", help="Add a row for these models as an ensemble."
)
@click.option("-o", "--out", type=PATH, help="File for the results.  [default: none]")
@html_option
@json_flag("Print the results as JSON.")
@judging_options
@trust_option
def command(
    models: tuple[str, ...],
    is_path: bool,
    ensembles: tuple[str, ...],
    out: Path | None,
    html: Path | None,
    as_json: bool,
    **asked: object,
) -> None:
    """Evaluate MODELs on the same items: directories, hub ids, model+adapter, or recipes (merged on the fly)."""
    check_files(out=out, html=html)
    members = [_members(text, is_path) for text in ensembles]
    how = judging(asked)
    if is_path:
        from eval.path import judge_path

        results = judge_path(models, how.of, how.settings, how.keep)
    else:
        results = how.judge(models, members)
    if out is not None:
        write_text(out, results.to_json())
    if html is not None:
        from eval.compare import compare
        from eval.html import page

        write_text(html, page(compare(results)))
    if as_json:
        click.echo(results.to_json(), nl=False)
        return
    if is_path:
        from eval.path import print_path

        print_path(results)
    else:
        from eval.tables import print_results

        print_results(results)
    for label, file in (("results", out), ("page", html)):
        if file is not None:
            click.echo(f"{label}: {file}")


def _members(text: str, is_path: bool) -> list[str]:
    """Raises UsageError for fewer than two, and beside --path."""
    from merge.errors import UsageError

    found = [name.strip() for name in text.split(",") if name.strip()]
    if len(found) < 2:
        raise UsageError(f'--ensemble "{text}": expected at least two models with commas between them.')
    if is_path:
        raise UsageError("--ensemble: cannot be combined with --path.")
    return found
