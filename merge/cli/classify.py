"""merge classify: Label texts with a classifier."""

from __future__ import annotations

import json
from pathlib import Path

import click

from merge.cli.models import opened, read_lines
from merge.cli.options import PATH, json_flag, trust_option
from merge.show.terminal import printable, show_table


@click.command(
    "classify",
    epilog="""\b
Examples:
  merge classify merged/sentiment --text "I liked it" --text "Never again"
  merge classify org/base+org/adapter --file reviews.txt --json""",
)
@click.argument("model")
@click.option("--text", "texts", multiple=True, help="A text; may be repeated.")
@click.option("--file", type=PATH, help="A text in each line.")
@click.option("--top", type=click.IntRange(1), default=3, show_default=True, help="Labels shown for each text.")
@click.option("--batch", type=click.IntRange(1), default=16, show_default=True, help="Texts at once.")
@json_flag("Print one line of JSON for each text, with all labels.")
@trust_option
def command(model: str, texts: tuple[str, ...], file: Path | None, top: int, batch: int, as_json: bool) -> None:
    """Label texts with MODEL, a sequence classifier: a directory, hub id, model+adapter, or recipe."""
    from merge.errors import UsageError
    from merge.tools.classify import classify

    if bool(texts) == (file is not None):
        raise UsageError("merge classify: expected --text or --file.")
    given = list(texts) if file is None else read_lines(file)
    with opened(model, "AutoModelForSequenceClassification") as loaded:
        found = classify(loaded, given, batch, lambda text: click.echo(printable(text), err=True))
    if as_json:
        for text, labels in zip(given, found, strict=True):
            click.echo(json.dumps({"text": text, "label": next(iter(labels)), "probabilities": labels}))
        return
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    for name in ("text", "label", "probability"):
        table.add_column(name, justify="right" if name == "probability" else "left")
    for text, labels in zip(given, found, strict=True):
        shown = printable(text if len(text) <= 60 else f"{text[:57]}...")
        for place, (label, share) in enumerate(list(labels.items())[:top]):
            table.add_row(shown if place == 0 else "", printable(label), f"{share:.4f}")
    show_table(table)
