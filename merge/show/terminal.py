"""Output that verbs share: sizes, tables, notes, and a progress bar on stderr."""

from __future__ import annotations

import contextlib
import os
import re
import sys
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table


def size(n_bytes: float) -> str:
    """1.53 GB, in powers of ten as disks and shard sizes are counted."""
    for unit in ("B", "kB", "MB", "GB"):
        if n_bytes < 1000:
            return f"{n_bytes:.0f} {unit}" if unit == "B" else f"{n_bytes:.3g} {unit}"
        n_bytes /= 1000
    return f"{n_bytes:,.2f} TB"


def console() -> Console:
    """For tables on stdout; in a pipe lines are not wrapped, so that grep finds them. Names are not markup."""
    from rich.console import Console

    wide = None if sys.stdout.isatty() or "COLUMNS" in os.environ else 10_000
    return Console(highlight=False, width=wide, markup=False, emoji=False)


_WORD = re.compile(r"[^\W\d_]{2}")  # in a cell that is no number
_NARROWEST = 16  # characters that a column of text keeps where the terminal is too narrow for the table


def show_table(table: Table, out: Console | None = None) -> None:
    """Prints a table without cutting or breaking a number: text is folded, then the table exceeds the terminal."""
    from rich.measure import Measurement

    out = out or console()
    needed = Measurement.get(out, out.options.update(width=10_000), table).maximum
    for number, column in enumerate(table.columns):
        cells = [str(cell) for cell in column.cells]
        widest = max(len(line) for cell in (str(column.header), *cells) for line in cell.split("\n"))
        is_text = number == 0 or (widest > _NARROWEST and any(map(_WORD.search, cells)))
        column.no_wrap, column.overflow = not is_text, "fold"
        needed -= max(widest - _NARROWEST, 0) if is_text else 0
    if needed > out.width:
        table.width = needed
    out.print(table, crop=False)


def printable(text: str) -> str:
    """A name from a file, with control characters escaped."""
    return "".join(letter if letter.isprintable() else repr(letter)[1:-1] for letter in text)


def show_notes(notes: Iterable[str], quiet: bool) -> None:
    """Prints notes, which are not errors, on stderr."""
    if not quiet:
        for note in notes:
            click.echo(f"note: {printable(note)}", err=True)


def memory(n_bytes: float) -> str:
    return f"{n_bytes / (1 << 20):,.0f} MiB"


@contextlib.contextmanager
def progress_bar(label: str, total: int, quiet: bool) -> Iterator[Callable[[int], None]]:
    """Bytes done, bytes a second and time left on stderr, if it is a terminal."""
    if quiet:
        yield lambda done: None
        return
    from rich.console import Console
    from rich.markup import escape
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    console = Console(stderr=True)
    with Progress(*columns, console=console, disable=not sys.stderr.isatty()) as bar:
        task = bar.add_task(escape(label), total=total)
        yield lambda done: bar.update(task, completed=done)


def number(value: float | None) -> str:
    return "" if value is None else f"{value:.3g}"


def percent(value: float | None) -> str:
    return "" if value is None else f"{value:.1%}"
