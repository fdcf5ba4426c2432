"""Is the merge better? Exact match of model directories on the quickstart skills, as a table.

python -m eval.quickstart DIR [DIR ...] [--items N] [--seed N] [--json]

The last directory is taken for the merge and compared with all the others. All are asked the same held-out prompts
(eval/exact_match.py). The standard error is that of drawing the prompts, not of training the models again.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path

import click

from eval.exact_match import MAX_ITEMS, SKILLS, Score, score

Scores = Mapping[str, Score]


def average(scores: Scores) -> float:
    """Mean of the skills' shares, each skill counting the same."""
    return sum(one.share for one in scores.values()) / len(scores)


def average_error(scores: Scores) -> float:
    """Standard error of average(); the skills' prompts are drawn independently."""
    return math.sqrt(sum(one.standard_error**2 for one in scores.values())) / len(scores)


def short_names(directories: tuple[str, ...]) -> list[str]:
    """Last parts of the paths, unless two are the same."""
    names = [Path(os.path.abspath(directory)).name for directory in directories]
    return names if len(set(names)) == len(names) else list(directories)


def verdict(names: list[str], results: list[Scores]) -> str:
    """Whether the last model is better on average than every other, in one plain sentence."""
    means = [average(scores) for scores in results]
    if len(means) == 1:
        return f"{names[0]} scores {means[0]:.1%} on average; there is no other model to compare it with."
    rival = max(range(len(means) - 1), key=means.__getitem__)
    gap = means[-1] - means[rival]
    error = math.hypot(average_error(results[-1]), average_error(results[rival]))
    if gap > 0:
        sure = f"{gap / error:.1f} standard errors above" if gap >= 2 * error else "within two standard errors of"
        claim = f"is better on average than every single model: {means[-1]:.1%}, {sure} the best of them"
    else:
        claim = f"is not better on average than every single model: {means[-1]:.1%}, not above the best of them"
    return f"{names[-1]} {claim}, {names[rival]} ({means[rival]:.1%})."


def print_table(names: list[str], results: list[Scores], items: int) -> None:
    """Models x skills on stdout; the best of each column in bold."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"Exact match, % ± standard error ({items} held-out prompts a skill)", title_justify="left")
    table.add_column("model")
    for skill in (*SKILLS, "average"):
        table.add_column(skill, justify="right")
    rows = [[(s.share, s.standard_error) for s in r.values()] + [(average(r), average_error(r))] for r in results]
    best = [max(row[column][0] for row in rows) for column in range(len(rows[0]))]
    for name, row in zip(names, rows, strict=True):
        cells = [
            f"[bold]{share:.1%}[/bold] ± {error:.1%}" if share == top else f"{share:.1%} ± {error:.1%}"
            for (share, error), top in zip(row, best, strict=True)
        ]
        table.add_row(name, *(cell.replace("%", "") for cell in cells))
    Console().print(table)


def as_json(directories: tuple[str, ...], results: list[Scores]) -> str:
    models = [
        {
            "model": directory,
            "skills": {
                name: {"correct": s.correct, "items": s.items, "share": s.share, "standard_error": s.standard_error}
                for name, s in scores.items()
            },
            "average": average(scores),
            "standard_error": average_error(scores),
        }
        for directory, scores in zip(directories, results, strict=True)
    ]
    means = [average(scores) for scores in results]
    last_is_best = len(means) > 1 and means[-1] > max(means[:-1])
    return json.dumps({"models": models, "last_is_best": last_is_best}, indent=2)


@click.command()
@click.argument("directories", metavar="DIR...", nargs=-1, required=True)
@click.option("--items", default=500, show_default=True, type=click.IntRange(1, MAX_ITEMS), help="Prompts a skill.")
@click.option("--seed", default=0, show_default=True, help="Draws the prompts.")
@click.option("--json", "json_wanted", is_flag=True, help="Print as JSON.")
def main(directories: tuple[str, ...], items: int, seed: int, json_wanted: bool) -> None:
    """Score model directories on the quickstart skills; the last one is compared with the others."""
    for directory in directories:
        if not (Path(directory) / "config.json").is_file():
            raise click.UsageError(f"{directory}: not a model directory, no config.json in it")
    results: list[Scores] = []
    for place, directory in enumerate(directories, start=1):
        click.echo(f"scoring {directory} ({place} of {len(directories)})", err=True)
        results.append(score(directory, tuple(SKILLS), items, seed))
    if json_wanted:
        click.echo(as_json(directories, results))
        return
    names = short_names(directories)
    print_table(names, results, items)
    click.echo(verdict(names, results))


if __name__ == "__main__":
    main()
