"""merge quantize: Store a model's linear layers in 8 or 4 bits."""

from __future__ import annotations

import dataclasses
import json
import math
import sys
from pathlib import Path

import click

from merge.cli.options import (
    PATH,
    json_flag,
    no_bar_option,
    out_option,
    shard_size_option,
    threads_option,
    trust_option,
)
from merge.errors import UsageError
from merge.needs import QUANTISED, need
from merge.show.terminal import printable, progress_bar, show_table, size
from merge.tools.stored_formats import FORMATS


@click.command(
    "quantize",
    epilog="""\b
Examples:
  merge quantize merged/mine -o merged/mine-nf4 --to nf4
  merge quantize org/model-7b -o out --to int8 --exclude '*.down_proj' --data held-out.jsonl
  merge quantize org/base-7b -o base-seen --to nf4 --dequantize --nested   # what QLoRA trained on
Loading again needs bitsandbytes (int8, nf4) or compressed-tensors (int4); fp8 is decoded to bfloat16 without a GPU.
Interrupted or killed, the same command resumes where it stopped.""",
)
@click.argument("model")
@out_option
@click.option("--to", required=True, type=click.Choice(list(FORMATS)), help="Format of linear layers.")
@click.option("--include", multiple=True, help="Only modules that match (model.layers.0.*); can include the head.")
@click.option("--exclude", multiple=True, help="Modules to leave unchanged.")
@click.option("--dequantize", is_flag=True, help="Write the values of the quantised weights, in the model's own dtype.")
@click.option("--nested", is_flag=True, help="With nf4: quantise the scales too, as QLoRA does.")
@click.option("--data", type=PATH, help="Texts for perplexity.  [default: a small sample]")
@click.option("--no-perplexity", is_flag=True, help="Do not load the models to measure perplexity.")
@threads_option
@shard_size_option
@click.option("--force", is_flag=True, help="Replace an existing result; discard unfinished work.")
@no_bar_option
@json_flag("Print the summary as JSON, with the error of each layer.")
@trust_option
def command(
    model: str,
    out: Path,
    to: str,
    include: tuple[str, ...],
    exclude: tuple[str, ...],
    dequantize: bool,
    nested: bool,
    data: Path | None,
    no_perplexity: bool,
    threads: int | None,
    shard_size: int,
    force: bool,
    quiet: bool,
    as_json: bool,
) -> None:
    """Store the linear layers of MODEL in 8 or 4 bits. Weights are streamed; only perplexity needs a model in memory.

    Embeddings, the head and norms stay unchanged.
    """
    if nested and not (dequantize and to == "nf4"):
        raise UsageError("--nested: needs --to nf4 --dequantize.")
    if nested:
        need("--nested", "quantize", "bitsandbytes", otherwise="Or leave it out.")
    if not (no_perplexity or dequantize):
        without = "Or leave the comparison of perplexities out: --no-perplexity."
        need(f"loading {to} again", "quantize", *QUANTISED[FORMATS[to].method], otherwise=without)
    from merge.checkpoint import open_checkpoint
    from merge.recipe.references import parse_reference
    from merge.statistics.data import read_texts
    from merge.tools.quantize import quantize
    from merge.tools.short_perplexity import perplexity

    try:
        ref = parse_reference(model)
    except ValueError as error:
        raise UsageError(f"{error}.") from None
    if data is not None:
        read_texts(data)  # its problems are reported before the work
    checkpoint = open_checkpoint(ref)
    total = sum(tensor.nbytes for tensor in checkpoint.tensors.values())
    with progress_bar(out.name, total, quiet or not sys.stderr.isatty()) as progress:
        done = quantize(
            ref,
            out,
            to,
            include=include,
            exclude=exclude,
            dequantize=dequantize,
            nested=nested,
            threads=threads,
            shard_bytes=shard_size,
            force=force,
            progress=progress,
        )
    scores = {} if no_perplexity else {"before": perplexity(checkpoint.path, data), "after": perplexity(str(out), data)}
    if as_json:
        click.echo(json.dumps(dataclasses.asdict(done) | {"perplexity": scores}))
        return
    share = done.bytes_after / done.bytes_before
    click.echo(f"{printable(done.out)}: {done.layers} linear layers in {to}, {done.kept} kept")
    click.echo(f"{size(done.bytes_before)} -> {size(done.bytes_after)} ({share:.1%})")
    _print_errors(done.errors)
    if scores:
        click.echo(f"perplexity {scores['before']:.3f} -> {scores['after']:.3f}")


def _print_errors(errors: dict[str, float]) -> None:
    """Errors by kind of layer: over all of them, and of the worst."""
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    for name in ("layers", "number", "relative RMS error", "worst", "in"):
        table.add_column(name, justify="left" if name in ("layers", "in") else "right")
    kinds: dict[str, dict[str, float]] = {}
    for name, error in errors.items():
        kinds.setdefault(name.rpartition(".")[2], {})[name] = error
    for kind, each in kinds.items():
        mean = math.sqrt(sum(error * error for error in each.values()) / len(each))
        worst = max(each, key=lambda name: each[name])
        table.add_row(printable(kind), str(len(each)), f"{mean:.3e}", f"{each[worst]:.3e}", printable(worst))
    show_table(table)
