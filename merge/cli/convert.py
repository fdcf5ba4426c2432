"""merge convert: Rewrite a model: another dtype, other shards, pickles to safetensors."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

from merge.cli.options import json_option, max_ram_option, out_option, quiet_option, shard_size_option, threads_option
from merge.show.terminal import console, progress_bar, show_notes, show_table

if TYPE_CHECKING:
    from merge.output.rounding import Rounding

_ALLOW = ("overflow", "nonfinite")


@click.command(
    "convert",
    epilog="""\b
Examples:
  merge convert org/model -o model-bf16 --dtype bf16
  merge convert old-pickle-model -o new          to safetensors, dtypes as they are
  merge convert model -o model-small --shard-size 2GB
Interrupted or killed, the same command resumes where it stopped.""",
)
@click.argument("model")
@out_option
@click.option("--dtype", help="bf16, fp16, fp32 or another float type.  [default: each tensor's own]")
@shard_size_option
@click.option(
    "--allow",
    multiple=True,
    type=click.Choice(_ALLOW),
    help="Allow results that overflow, or NaN and infinity; may be repeated.",
)
@threads_option
@max_ram_option
@click.option("--force", is_flag=True, help="Replace an existing result; discard unfinished other work.")
@quiet_option
@json_option
def command(
    model: str,
    out: Path,
    dtype: str | None,
    shard_size: int,
    allow: tuple[str, ...],
    threads: int | None,
    max_ram: int | None,
    force: bool,
    quiet: bool,
    as_json: bool,
) -> None:
    """Write MODEL as safetensors, in another dtype or other shards, and report what the rounding changed."""
    from merge.engine.run import run_plan
    from merge.errors import NumbersError
    from merge.output.manifest import read_manifest
    from merge.output.rounding import rounding_of
    from merge.show.plan import show_report
    from merge.tools.convert import convert_plan

    plan = convert_plan(model, dtype, shard_bytes=shard_size, allow=allow)
    show_notes(plan.notes, quiet)
    total = sum(step.nbytes for step in plan.steps)
    try:
        with progress_bar(plan.name, total, quiet or not sys.stderr.isatty()) as progress:
            report = run_plan(plan, out, threads=threads, max_ram=max_ram, force=force, progress=progress)
    except NumbersError as error:
        message = str(error)
        for name in _ALLOW:
            message = message.replace(f'set "allow: [{name}]"', f"give --allow {name}")
            message = message.replace(f'Set "allow: [{name}]"', f"Give --allow {name}")
        raise NumbersError(message) from error
    rounding = rounding_of(read_manifest(out))
    if as_json:
        click.echo(json.dumps({**dataclasses.asdict(report), "rounding": [dataclasses.asdict(r) for r in rounding]}))
        return
    show_report(plan, report)
    if rounding:
        _show(rounding)


def _show(rounding: list[Rounding]) -> None:
    from rich.table import Table

    table = Table("kind", "tensors", "numbers", "changed", "to zero", "to infinity", box=None, pad_edge=False)
    table.add_column("largest relative change")
    table.add_column("rms")
    for entry in rounding:
        table.add_row(
            entry.kind,
            str(entry.tensors),
            f"{entry.numbers:,}",
            f"{entry.changed / max(1, entry.numbers):.2%}",
            f"{entry.underflow:,}",
            f"{entry.overflow:,}",
            f"{entry.largest:.3g}",
            f"{entry.rms:.3g}",
        )
    out = console()
    out.print()
    show_table(table, out)
