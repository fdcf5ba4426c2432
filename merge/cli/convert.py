"""merge convert: Rewrite a model: another dtype, other shards, pickles to safetensors, GGUF."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

from merge.cli.options import (
    elapsed,
    json_option,
    max_ram_option,
    out_option,
    quiet_option,
    shard_size_option,
    threads_option,
)
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
  merge convert model-GPTQ -o model-bf16 --dequantize --dtype bf16
  merge convert merged/mine -o mine.gguf --to q8_0     for llama.cpp and Ollama
  merge convert recipe.yaml -o mine.gguf --to q4_0     merges into the file, in one pass
Interrupted or killed, the same command resumes where it stopped.""",
)
@click.argument("model")
@out_option
@click.option("--dtype", help="bf16, fp16, fp32 or another float type.  [default: each tensor's own]")
@click.option("--dequantize", is_flag=True, help="Fail unless the model is quantised; numbers are plain in any case.")
@click.option(
    "--to", help="For an OUT that ends in .gguf: f32, f16, bf16, q8_0, q5_1, q5_0, q4_1 or q4_0.  [default: f16]"
)
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
    dequantize: bool,
    to: str | None,
    shard_size: int,
    allow: tuple[str, ...],
    threads: int | None,
    max_ram: int | None,
    force: bool,
    quiet: bool,
    as_json: bool,
) -> None:
    """Write MODEL as safetensors, in another dtype or other shards, or as a GGUF file; report what rounding changed."""
    if out.suffix == ".gguf" or to is not None:
        if dequantize:
            from merge.errors import UsageError

            raise UsageError("--dequantize: of no use with a GGUF file, whose numbers are those of --to. Leave it out.")
        _to_gguf(model, out, to, dtype, threads, force, quiet, as_json)
        return
    from merge.engine.run import run_plan
    from merge.errors import NumbersError
    from merge.output.manifest import read_manifest
    from merge.output.rounding import rounding_of
    from merge.show.plan import show_report
    from merge.tools.convert import convert_plan

    plan = convert_plan(model, dtype, dequantize=dequantize, shard_bytes=shard_size, allow=allow)
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
    show_report(plan, report, elapsed())
    if rounding:
        _show(rounding)


def _to_gguf(
    model: str,
    out: Path,
    to: str | None,
    dtype: str | None,
    threads: int | None,
    force: bool,
    quiet: bool,
    as_json: bool,
) -> None:
    from merge.errors import UsageError
    from merge.tools.to_gguf.write import write_gguf

    if out.suffix != ".gguf":
        raise UsageError(f"--to: expected an --out that ends in .gguf, found {out}. For safetensors use --dtype.")
    if dtype is not None:
        raise UsageError("--dtype: a GGUF file takes --to.")
    with progress_bar(out.name, 1000, quiet or not sys.stderr.isatty()) as progress:
        report = write_gguf(
            model,
            out,
            to or "f16",
            threads=threads,
            force=force,
            progress=lambda done, of: progress(1000 * done // max(1, of)),
        )
    if as_json:
        click.echo(json.dumps(dataclasses.asdict(report)))
        return
    show_notes(report.notes, quiet)
    kinds = ", ".join(f"{count} {kind}" for kind, count in report.kinds.items())
    click.echo(
        f"{out}: {report.tensors:,} tensors ({kinds}), {report.bytes_written / 1e6:,.1f} MB, {report.seconds:.1f} s"
    )


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
