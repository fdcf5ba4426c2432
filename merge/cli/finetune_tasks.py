"""merge finetune of a config that names tasks: several trainings, merges, one table."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import click

from merge.show.terminal import printable

if TYPE_CHECKING:
    from finetune.train import Progress, Say

Bar = Callable[[str, bool], contextlib.AbstractContextManager[Any]]


def run_tasks(
    file: str,
    flags: dict[str, list[str]],
    *,
    strategy: str | None,
    workers: int | None,
    device: str | None,
    threads: int | None,
    force: bool,
    quiet: bool,
    as_json: bool,
    say: Say,
    bar: Bar,
) -> None:
    """Trains, merges, scores, and prints the table. `bar`: (name of a stage, quiet) -> its progress."""
    import dataclasses

    from finetune.strategies import load_tasks, run_strategies
    from finetune.strategies.table import as_json as json_of
    from finetune.strategies.table import rows

    tasks = load_tasks(file, flags, strategy)
    if workers is not None:
        tasks = dataclasses.replace(tasks, workers=workers)

    @contextlib.contextmanager
    def progress(name: str) -> Iterator[Progress]:
        with bar(name, quiet) as update:
            yield update

    results = run_strategies(tasks, device=device, threads=threads, force=force, say=say, progress=progress)
    names = [task.name for task in tasks.tasks]
    if as_json:
        click.echo(json.dumps(json_of(names, results)))
        return
    what = (
        "held-out loss in nats a token, exact match" if results[0].exact is not None else "held-out loss, nats a token"
    )
    click.echo(f"{printable(str(tasks.out))}: {what}")
    for line in aligned(rows(names, results)):
        click.echo(printable(line))


def aligned(table: list[list[str]]) -> list[str]:
    """Columns of one width, the first to the left and the others to the right."""
    widths = [max(len(row[i]) for row in table) for i in range(len(table[0]))]
    return [
        "  ".join(
            cell.ljust(width) if i == 0 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in table
    ]
