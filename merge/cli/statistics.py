"""merge statistics: Collect the statistics of a model that regmean and fisher need."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path

import click

from merge.cli.options import PATH, json_option, quiet_option, refuse_above_option, trust_option
from merge.quoting import counted
from merge.show.terminal import printable, progress_bar, show_notes


@click.command(
    "statistics",
    epilog="""\b
Examples:
  merge statistics org/math-7b --data math.jsonl -o math.safetensors
  merge statistics org/math-7b --data math.txt -o math.safetensors --kind fisher --max-tokens 20000
Name the file in the recipe, beside the model:   statistics: math.safetensors
Interrupted or killed, the same command resumes where it stopped.""",
)
@click.argument("model")
@click.option("--data", required=True, type=PATH, help='.jsonl with "text" in each line, or lines of text.')
@click.option("-o", "--out", required=True, type=PATH, help="File to write.")
@click.option(
    "--kind",
    type=click.Choice(["gram", "fisher", "both"]),
    default="gram",
    show_default=True,
    help="gram for regmean; fisher for fisher.",
)
@click.option("--max-tokens", type=click.IntRange(2), default=65536, show_default=True, help="Tokens in total.")
@click.option(
    "--sequence-length",
    type=click.IntRange(2),
    default=512,
    show_default=True,
    help="Tokens per sequence; longer texts are split.",
)
@click.option("--batch", type=click.IntRange(1), default=8, show_default=True, help="Sequences at once (gram).")
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True, help="Seed of the order of the texts.")
@refuse_above_option
@click.option("--force", is_flag=True, help="Replace an existing file; discard unfinished work of another run.")
@quiet_option
@json_option
@trust_option
def command(
    model: str,
    data: Path,
    out: Path,
    kind: str,
    max_tokens: int,
    sequence_length: int,
    batch: int,
    seed: int,
    max_ram: int | None,
    force: bool,
    quiet: bool,
    as_json: bool,
) -> None:
    """Collect statistics of MODEL on a text, for the methods regmean and fisher.

    gram: X^T X of the inputs of every linear layer, layer by layer: memory holds one layer and its matrices. fisher:
    squared gradients of the log-likelihood of each sequence, averaged; this needs the whole model, 16 bytes for each
    parameter, and starts over if it is interrupted.
    """
    from merge.checkpoint import open_checkpoint
    from merge.errors import UsageError
    from merge.recipe.references import parse_reference
    from merge.statistics import collect_statistics

    try:
        ref = parse_reference(model)
    except ValueError as error:
        raise UsageError(f"{error}.") from None
    total = sum(tensor.nbytes for tensor in open_checkpoint(ref).tensors.values()) * (2 if kind == "both" else 1)
    with progress_bar(out.name, total, quiet or not sys.stderr.isatty()) as progress:
        summary = collect_statistics(
            ref,
            data,
            out,
            kind=kind,
            max_tokens=max_tokens,
            length=sequence_length,
            batch=batch,
            seed=seed,
            max_ram=max_ram,
            force=force,
            say=lambda note: show_notes([note], quiet),
            progress=progress,
        )
    if as_json:
        click.echo(json.dumps(dataclasses.asdict(summary)))
        return
    resumed = f" ({summary.resumed_parts} parts taken from an earlier run)" if summary.resumed_parts else ""
    tensors, tokens = counted(summary.tensors, "tensor"), counted(summary.tokens, "token")
    click.echo(f"{printable(summary.out)}: {' and '.join(summary.kinds)}, {tensors}{resumed}")
    click.echo(f"{tokens} in {counted(summary.sequences, 'sequence')}, {summary.seconds:.1f} s")
