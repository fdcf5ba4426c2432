"""merge lora: Fold a LoRA adapter into a model, extract one from a fine-tune, or show one."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

from merge.cli.options import (
    force_option,
    json_flag,
    json_option,
    out_option,
    quiet_option,
    shard_size_option,
    threads_option,
)
from merge.quoting import counted
from merge.show.terminal import printable, progress_bar, show_notes, show_table, size

if TYPE_CHECKING:
    from merge.recipe.model import ModelRef
    from merge.tools.extract import Summary


@click.group(
    "lora",
    epilog="""\b
Examples:
  merge lora fold org/base-7b org/my-adapter -o merged
  merge lora extract tuned --base org/base-7b -o adapter --rank 32
  merge lora show adapter""",
)
def command() -> None:
    """Fold a LoRA adapter into its base, extract one from a fine-tune, or show one.

    In a recipe, MODEL+ADAPTER stands for the folded model, without writing it.
    """


@command.command("fold")
@click.argument("model")
@click.argument("adapter")
@out_option
@click.option("--dtype", help="Dtype of the result.  [default: the model's]")
@click.option("--adapter-tokenizer", is_flag=True, help="Take the adapter's tokenizer and chat template.")
@threads_option
@shard_size_option
@click.option("--force", is_flag=True, help="Replace an existing result.")
@quiet_option
@json_option
def fold(
    model: str,
    adapter: str,
    out: Path,
    dtype: str | None,
    adapter_tokenizer: bool,
    threads: int | None,
    shard_size: int,
    force: bool,
    quiet: bool,
    as_json: bool,
) -> None:
    """Write MODEL with ADAPTER folded in: what PEFT's merge_and_unload makes of it, streamed."""
    from merge.engine.run import run_plan
    from merge.jobs.build import build_plan
    from merge.planning.resolve import made_recipe
    from merge.recipe.fields import stored_dtype
    from merge.recipe.model import Recipe, Source

    base, change = (_plain(text) for text in (model, adapter))
    recipe = Recipe(
        "passthrough",
        (Source(dataclasses.replace(base, text=f"{base.text}+{change.text}", adapter=change)),),
        name=out.name or "folded",
        dtype=None if dtype is None else stored_dtype(dtype),
        tokenizer_source=change.text if adapter_tokenizer else None,
    )
    plan = build_plan(made_recipe(recipe), shard_bytes=shard_size)
    show_notes(plan.notes, quiet)
    with progress_bar(plan.name, plan.bytes_written, quiet or not sys.stderr.isatty()) as progress:
        report = run_plan(plan, out, threads=threads, force=force, progress=progress)
    if as_json:
        click.echo(json.dumps(dataclasses.asdict(report)))
        return
    changed = sum(source.is_computed for step in plan.steps for source in step.inputs)
    click.echo(
        f"{printable(report.out)}: {counted(report.tensors, 'tensor')}, {changed} of them changed by the adapter, "
        f"{size(report.bytes_written)}, {report.seconds:.1f} s"
    )


@command.command(
    "extract",
    epilog="""\b
Examples:
  merge lora extract tuned --base org/base-7b -o adapter
  merge lora extract tuned --base org/base-7b -o adapter --energy 0.95 --rank 128
  merge lora extract tuned --base base -o adapter --include '*.self_attn.*' --rank-pattern v_proj=64
Interrupted or killed, the same command resumes where it stopped.""",
)
@click.argument("finetuned")
@click.option("--base", required=True, help="The model that it was fine-tuned from.")
@out_option
@click.option("--rank", type=click.IntRange(1), help="Rank; with --energy, the maximum.  [default: 16]")
@click.option("--energy", type=click.FloatRange(0, 1, min_open=True), help="Share of each difference to keep.")
@click.option(
    "--rank-pattern", "patterns", multiple=True, metavar="RE=RANK", help="Rank of the modules whose names end so."
)
@click.option("--include", multiple=True, metavar="PATTERN", help="Only modules of such names, e.g. '*.mlp.*'.")
@click.option("--exclude", multiple=True, metavar="PATTERN", help="No modules of such names.")
@click.option("--embeddings", is_flag=True, help="Also extract factors for the token embedding and the head.")
@click.option(
    "--save-modules", is_flag=True, help="Keep tensors that differ and have no factors (norms, biases) whole."
)
@click.option(
    "--method",
    type=click.Choice(["randomized", "exact"]),
    default="randomized",
    show_default=True,
    help="How singular vectors are found; the error is exact with both.",
)
@click.option(
    "--dtype",
    type=click.Choice(["float32", "bfloat16", "float16"]),
    default="float32",
    show_default=True,
    help="Of the factors.",
)
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True, help="Of the randomised start.")
@click.option("--threads", type=click.IntRange(1, 1024), help="Modules at once.  [default: all processors]")
@force_option
@quiet_option
@json_option
def extract(
    finetuned: str,
    base: str,
    out: Path,
    rank: int | None,
    energy: float | None,
    patterns: tuple[str, ...],
    include: tuple[str, ...],
    exclude: tuple[str, ...],
    embeddings: bool,
    save_modules: bool,
    method: str,
    dtype: str,
    seed: int,
    threads: int | None,
    force: bool,
    quiet: bool,
    as_json: bool,
) -> None:
    """Extract a LoRA adapter from the difference between FINETUNED and its base.

    For each linear layer the nearest change of that rank, with its relative error. What an adapter cannot hold (norms,
    biases) is reported with its share of the whole difference.
    """
    from merge.adapters.fold import open_model
    from merge.dtypes import RECIPE_NAMES
    from merge.tools.extract import extract_adapter
    from merge.tools.extract.select import Choice

    tuned_ref, base_ref = _reference(finetuned), _reference(base)
    choice = Choice(
        rank=rank if rank is not None or energy is not None else 16,
        energy=energy,
        rank_pattern=dict(map(_rank_pattern, patterns)),
        include=include,
        exclude=exclude,
        embeddings=embeddings,
    )
    total = sum(ref.nbytes for ref in open_model(base_ref).tensors.values())
    with progress_bar(out.name, total, quiet or not sys.stderr.isatty()) as progress:
        summary = extract_adapter(
            tuned_ref,
            base_ref,
            out,
            choice=choice,
            method=method,
            save_modules=save_modules,
            dtype=RECIPE_NAMES[dtype],
            seed=seed,
            threads=threads,
            force=force,
            progress=progress,
        )
    if as_json:
        click.echo(json.dumps(dataclasses.asdict(summary)))
        return
    show_notes(summary.notes, quiet)
    _print_extracted(summary)


def _print_extracted(summary: Summary) -> None:
    from rich.table import Table

    table = Table("Module", "Shape", "Rank", "Relative error", "Share of all", box=None)
    for row in summary.modules:
        shape = " x ".join(map(str, row["shape"]))
        table.add_row(printable(row["module"]), shape, str(row["rank"]), f"{row['error']:.2e}", f"{row['share']:.2%}")
    show_table(table)
    left = [each for each in summary.others if not each["saved"]]
    if left:
        click.echo(f"left out, {sum(each['share'] for each in left):.2%} of the whole difference:")
        table = Table("Tensor", "Relative change", "Share of all", box=None)
        for each in sorted(left, key=lambda item: -item["share"])[:20]:
            table.add_row(printable(each["tensor"]), f"{each['change']:.2e}", f"{each['share']:.2%}")
        show_table(table)
        if len(left) > 20:
            click.echo(f"and {len(left) - 20} more; --json lists them all")
    saved = len(summary.others) - len(left)
    whole = f", {counted(saved, 'tensor')} kept whole" if saved else ""
    click.echo(
        f"{printable(summary.out)}: {len(summary.modules)} modules{whole}, {summary.parameters:,} parameters, "
        f"{size(summary.bytes_written)}, {summary.seconds:.1f} s"
    )
    click.echo(
        f"relative error {summary.error:.2e} over these modules, {summary.total_error:.2e} over all that differs"
    )


@command.command("show")
@click.argument("adapter")
@json_flag("Print it as JSON.")
def show(adapter: str, as_json: bool) -> None:
    """Modules of ADAPTER with rank, scaling, parameters and the length of the change they make."""
    from rich.table import Table

    from merge.adapters.files import open_adapter
    from merge.tools.extract.look import look_into

    opened = open_adapter(_reference(adapter))
    rows = look_into(opened)
    if as_json:
        click.echo(json.dumps({"adapter": opened.path, "base": opened.base_name, "tensors": rows}))
        return
    table = Table("Module", "Kind", "Rank", "Scaling", "Parameters", "‖change‖", box=None)
    for row in rows:
        rank, scaling, norm = ("" if row[key] is None else f"{row[key]:.4g}" for key in ("rank", "scaling", "norm"))
        table.add_row(printable(row["name"]), row["kind"], rank, scaling, f"{row['parameters']:,}", norm)
    show_table(table)
    total = sum(row["parameters"] for row in rows)
    click.echo(f"{printable(opened.path)}: {total:,} parameters, made for {printable(str(opened.base_name))}")
    for note in opened.notes:
        click.echo(f"note: {printable(note)}", err=True)


def _reference(text: str) -> ModelRef:
    from merge.errors import UsageError
    from merge.recipe.references import parse_reference

    try:
        return parse_reference(text)
    except ValueError as error:
        raise UsageError(f"{error}.") from None


def _plain(text: str) -> ModelRef:
    """A model or an adapter by itself."""
    ref = _reference(text)
    if ref.adapter is not None:
        from merge.errors import UsageError

        raise UsageError(f'"{text}" has an adapter already. Fold that one first.')
    return dataclasses.replace(ref, text=ref.path if ref.revision is None else f"{ref.path}@{ref.revision}")


def _rank_pattern(text: str) -> tuple[str, int]:
    import re

    from merge.errors import UsageError

    pattern, _, rank = text.rpartition("=")
    if not pattern or not rank.isdecimal() or not int(rank):
        raise UsageError(f'--rank-pattern "{text}": expected RE=RANK, for example v_proj=32.')
    try:
        re.compile(pattern)
    except re.error as error:
        raise UsageError(f'--rank-pattern "{text}": not a regular expression ({error}).') from None
    return pattern, int(rank)
