"""merge formats: Show numbers, or a model's weights, in BF16, FP16, FP8, INT8 and NF4."""

from __future__ import annotations

import json
import math
import sys
from typing import TYPE_CHECKING

import click

from merge.cli.options import json_flag, no_bar_option
from merge.show.terminal import console, printable, progress_bar, show_table

if TYPE_CHECKING:
    from merge.tools.format_survey import Survey
    from merge.tools.formats import InFormat


@click.command(
    "formats",
    # so that a negative number is not taken for an option
    context_settings={"ignore_unknown_options": True},
    epilog="""\b
Examples:
  merge formats 1234.56789 -0.1
  merge formats 0.03 --absmax 0.5                the largest weight that shares its INT8 or NF4 scale
  merge formats --model org/model-7b""",
)
@click.argument("numbers", nargs=-1, type=click.UNPROCESSED)
@click.option("--absmax", type=float, help="INT8's and NF4's largest magnitude.  [default: that of the numbers]")
@click.option("--model", help="A checkpoint whose weights are rounded to each format: directory or hub id.")
@click.option("--threads", type=click.IntRange(1, 1024), help="Threads for --model.  [default: all processors]")
@no_bar_option
@json_flag("Print JSON.")
def command(
    numbers: tuple[str, ...], absmax: float | None, model: str | None, threads: int | None, quiet: bool, as_json: bool
) -> None:
    """Show NUMBERS in FP32, TF32, BF16, FP16, FP8, INT8 and NF4, or what a model's weights lose in each."""
    from merge.errors import UsageError

    if bool(numbers) == (model is not None):
        raise UsageError("merge formats: expected numbers, or --model MODEL. See merge formats --help.")
    if model is not None:
        _model(model, threads, quiet, as_json)
        return
    values = [_number(text) for text in numbers]
    if absmax is None:
        absmax = max((abs(value) for value in values if math.isfinite(value)), default=0.0) or 1.0
    if not (math.isfinite(absmax) and absmax > 0):
        raise UsageError(f"--absmax {absmax}: expected a finite number above 0.")
    _numbers(values, absmax, as_json)


def _number(text: str) -> float:
    from merge.errors import UsageError

    try:
        return float(text)
    except ValueError:
        raise UsageError(f'"{text}" is not a number; write for example 0.1, -3e-5 or inf.') from None


def _numbers(values: list[float], absmax: float, as_json: bool) -> None:
    from merge.tools.formats import in_all_formats

    if as_json:
        rows = [_plain(stored) for value in values for stored in in_all_formats(value, absmax)]
        click.echo(json.dumps({"absmax": absmax, "values": rows}))
        return
    from rich.table import Table
    from rich.text import Text

    out = console()
    for value in values:
        table = Table(box=None, pad_edge=False, title=f"{value!r}", title_justify="left")
        for name in ("format", "bits", "stored", "absolute error", "relative error"):
            table.add_column(name, justify="left" if name in ("format", "bits") else "right")
        for stored in in_all_formats(value, absmax):
            colours = ("red", "green", "blue") if len(stored.bits) == 3 else ("blue",)
            bits = Text(" ").join(Text(part, style=style) for part, style in zip(stored.bits, colours, strict=True))
            table.add_row(
                Text(stored.format), bits, repr(stored.stored), f"{stored.absolute:.3g}", _percent(stored.relative)
            )
        show_table(table, out)
    click.echo(f"INT8 and NF4 with absmax {absmax:g}; sign, exponent, mantissa")


def _percent(share: float) -> str:
    return f"{share:.3%}" if math.isfinite(share) else "-"


def _plain(stored: InFormat) -> dict[str, object]:
    """For JSON, which has neither infinity nor NaN: they become strings."""

    def plain(value: float) -> float | str:
        return value if math.isfinite(value) else str(value)

    return {
        "value": plain(stored.value),
        "format": stored.format,
        "bits": list(stored.bits),
        "stored": plain(stored.stored),
        "absolute_error": plain(stored.absolute),
        "relative_error": plain(stored.relative),
    }


def _model(model: str, threads: int | None, quiet: bool, as_json: bool) -> None:
    from merge.checkpoint import open_checkpoint
    from merge.errors import UsageError
    from merge.recipe.references import parse_reference
    from merge.tools.format_survey import survey

    try:
        checkpoint = open_checkpoint(parse_reference(model))
    except ValueError as error:
        raise UsageError(f"{error}.") from None
    total = sum(ref.nbytes for ref in checkpoint.tensors.values())
    with progress_bar("formats", total, quiet or as_json or not sys.stderr.isatty()) as progress:
        found = survey(checkpoint, threads=threads, progress=progress)
    if as_json:
        losses = {
            kind: {form: vars(loss) | {"relative_rms": loss.relative_rms} for form, loss in each.items()}
            for kind, each in found.losses.items()
        }
        click.echo(json.dumps({"losses": losses, "nonfinite": found.nonfinite, "skipped": found.skipped}))
        return
    _print(model, found)


def _print(model: str, found: Survey) -> None:
    from rich.table import Table

    if not found.losses:
        click.echo(f"{printable(model)}: no weights of a float type")
        return
    table = Table(box=None, pad_edge=False)
    for name in ("tensors", "format", "weights", "overflow", "underflow", "changed", "relative RMS error"):
        table.add_column(name, justify="left" if name in ("tensors", "format") else "right")
    for kind, losses in found.losses.items():
        for form, loss in losses.items():
            shares = (_share(n, loss.weights) for n in (loss.overflow, loss.underflow, loss.changed))
            table.add_row(kind, form, f"{loss.weights:,}", *shares, f"{loss.relative_rms:.2e}")
    show_table(table)
    if found.nonfinite:
        click.echo(f"note: {found.nonfinite:,} weights are NaN or infinite; they count as zeros")
    for name in found.skipped[:3]:
        click.echo(f"note: {printable(name)} holds no floats and is left out")


def _share(n: int, total: int) -> str:
    return "0" if n == 0 else f"{n / total:.4%}"
