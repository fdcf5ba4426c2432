"""merge transplant: Give a model another model's tokenizer."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import click

from merge.cli.options import (
    Size,
    force_option,
    json_option,
    out_option,
    quiet_option,
    shard_size_option,
    threads_option,
    trust_option,
)
from merge.quoting import counted
from merge.show.terminal import memory, printable, progress_bar, show_notes, size
from merge.tools.transplant import METHODS


@click.command(
    "transplant",
    epilog="""\b
Examples:
  merge transplant org/model org/donor -o model-with-donors-tokenizer
  merge transplant ./model ./donor -o out --method mean
Interrupted or killed, the same command resumes where it stopped.""",
)
@click.argument("model")
@click.argument("donor")
@out_option
@click.option(
    "--method",
    type=click.Choice(list(METHODS)),
    default="omp",
    show_default=True,
    help="Rows for tokens that MODEL lacks.",
)
@click.option(
    "--k",
    type=click.IntRange(1, 4096),
    default=64,
    show_default=True,
    help="Shared tokens in one row's combination (omp).",
)
@threads_option
@click.option("--max-ram", type=Size(), help="Limit on memory, e.g. 4GiB.")
@click.option("--device", default="cpu", show_default=True, help="cpu, or cuda to find combinations on a GPU.")
@shard_size_option
@force_option
@quiet_option
@json_option
@trust_option
def command(
    model: str,
    donor: str,
    out: Path,
    method: str,
    k: int,
    threads: int | None,
    max_ram: int | None,
    device: str,
    shard_size: int,
    force: bool,
    quiet: bool,
    as_json: bool,
) -> None:
    """Give MODEL the tokenizer of DONOR.

    Tokens that both have keep MODEL's rows. omp: each of the others is written as a combination of k shared tokens in
    DONOR's embeddings, and gets that combination of MODEL's. mean: the mean of the pieces into which MODEL's tokenizer
    cuts it. zero: zeros. copy-only: the mean of all copied rows.
    """
    from merge.cli.options import check_device
    from merge.errors import UsageError
    from merge.output.directory import check_out, partial_of
    from merge.processors import processors
    from merge.recipe.references import parse_reference
    from merge.tools.transplant import plan as work
    from merge.tools.transplant import rows as new_rows

    try:
        refs = [parse_reference(text) for text in (model, donor)]
    except ValueError as error:
        raise UsageError(f"{error}.") from None
    check_out(out, force)
    check_device(device)
    threads = threads or processors()
    job = work.prepare(refs[0], refs[1], method, k)
    batches = new_rows.threads_within(job, threads, max_ram)
    rows_file = partial_of(out).with_name(out.name + ".rows.safetensors")
    rows_file.parent.mkdir(parents=True, exist_ok=True)
    label = printable(out.name)
    if job.bytes_combined and not quiet:
        held, written = memory(new_rows.peak_bytes(job, batches)), size(job.bytes_combined)
        click.echo(f"note: finding combinations takes up to {held} of memory and {written} of disk meanwhile", err=True)
    bar_off = quiet or not sys.stderr.isatty()
    with progress_bar(f"{label}: new rows", job.bytes_combined, bar_off or not job.bytes_combined) as progress:
        rows = new_rows.make_rows(job, rows_file, batches, device, progress)
    plan = work.plan_transplant(job, rows, shard_size, out.name)
    show_notes(plan.notes, quiet)
    from merge.engine.run import run_plan

    with progress_bar(label, sum(step.nbytes for step in plan.steps), bar_off) as progress:
        report = run_plan(
            plan,
            out,
            threads=threads,
            max_ram=max_ram,
            force=force,
            progress=progress,
            last=lambda: rows_file.unlink(missing_ok=True),
        )
    if as_json:
        facts = {
            "out": str(out),
            "method": method,
            "k": k if method == "omp" else None,
            "shared": len(job.shared),
            "new": len(job.new),
            "combined": len(job.combined),
            "residuals": job.residuals,
            "rows": job.n_rows,
            "seconds": report.seconds,
            "peak_memory": report.peak_memory,
        }
        click.echo(json.dumps(facts))
        return
    click.echo(f"{printable(str(out))}: {counted(report.tensors, 'tensor')}, {size(report.bytes_written)}")
    click.echo(work.summary(job))
    click.echo(f"peak memory {memory(report.peak_memory)}")
