"""merge run"""

from __future__ import annotations

import dataclasses
import json
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from merge.cli.show import (
    COMPAT_HELP,
    METHOD_FILE_HELP,
    STAGES_DIR_HELP,
    Size,
    memory,
    printable,
    progress_bar,
    show_notes,
    size,
)
from merge.cli.trust import trust_option

if TYPE_CHECKING:
    from merge.engine.run import Report
    from merge.plan import Plan


@click.command(
    "run",
    epilog="""\b
Examples:
  merge run recipe.yaml                        writes ./merged/NAME
  merge run recipe.yaml -o out --shard-size 2GB
  merge run recipe.yaml --threads 4 --max-ram 1GiB
  merge run pipeline.yaml --keep-stages        several documents; later ones use earlier ones
Interrupted or killed, the same command resumes where it stopped.""",
)
@click.argument("recipe")
@click.option(
    "-o", "--out", type=click.Path(path_type=Path), help="Directory for the result.  [default: ./merged/NAME]"
)
@click.option("--threads", type=click.IntRange(1, 1024), help="Worker threads.  [default: all processors]")
@click.option("--max-ram", type=Size(), help="Limit on memory, e.g. 1GiB.")
@click.option("--device", default="cpu", show_default=True, help="cpu, or cuda to compute on a GPU.")
@click.option("--shard-size", type=Size(), default="5GB", show_default=True, help="Largest output file.")
@click.option("--method-file", "method_files", multiple=True, type=click.Path(path_type=Path), help=METHOD_FILE_HELP)
@click.option("--stages-dir", type=click.Path(path_type=Path), help=STAGES_DIR_HELP)
@click.option("--keep-stages", is_flag=True, help="Write and keep every stage of a pipeline.")
@click.option("--compat", type=click.Choice(["mergekit"]), help=COMPAT_HELP)
@click.option("--force", is_flag=True, help="Replace an existing result; discard unfinished work of another recipe.")
@click.option("--quiet", is_flag=True, help="No progress bar and no notes.")
@click.option("--json", "as_json", is_flag=True, help="Print the summary as JSON.")
@trust_option
def command(
    recipe: str,
    out: Path | None,
    threads: int | None,
    max_ram: int | None,
    device: str,
    shard_size: int,
    method_files: tuple[Path, ...],
    stages_dir: Path | None,
    keep_stages: bool,
    compat: str | None,
    force: bool,
    quiet: bool,
    as_json: bool,
) -> None:
    """Carry out RECIPE and write the merged checkpoint."""
    from merge.planners.build import build_plan
    from merge.recipe.pipeline import load_pipeline
    from merge.user_methods import load_method_file

    for file in method_files:
        load_method_file(file)
    pipeline = load_pipeline(recipe, compat)
    if len(pipeline.stages) > 1:
        from merge.cli.pipelines import run_stages

        check_device(device)
        options = {"threads": threads, "max_ram": max_ram, "device": device, "force": force, "shard_bytes": shard_size}
        run_stages(pipeline, out, options | {"stages_dir": stages_dir, "keep_stages": keep_stages}, quiet, as_json)
        return
    plan = build_plan(pipeline.stages[0].recipe, shard_bytes=shard_size)
    out = out or Path("merged") / plan.name
    show_notes(plan.notes, quiet)
    check_device(device)
    run_single(plan, out, {"threads": threads, "max_ram": max_ram, "device": device, "force": force}, quiet, as_json)


def run_single(plan: Plan, out: Path, options: dict[str, Any], quiet: bool, as_json: bool) -> None:
    """Carries out one plan and says what was done; `options` are run_plan's."""
    from merge.engine.run import run_plan

    with progress_bar(plan.name, sum(step.nbytes for step in plan.steps), quiet or not sys.stderr.isatty()) as progress:
        report = run_plan(plan, out, progress=progress, **options)
    if as_json:
        click.echo(json.dumps(dataclasses.asdict(report)))
        return
    show_report(plan, report)


def show_report(plan: Plan, report: Report) -> None:
    resumed = f" ({report.resumed_tensors} of them taken from an earlier run)" if report.resumed_tensors else ""
    written = f"{plan.n_parameters:,} parameters, {size(report.bytes_written)}"
    click.echo(f"{printable(report.out)}: {report.tensors} tensors{resumed}, {written}")
    rate = (report.bytes_read + report.bytes_written) / max(report.seconds, 1e-9)
    click.echo(f"{report.seconds:.1f} s, {size(rate)}/s read and written, peak memory {memory(report.peak_memory)}")
    for entry in report.aligned:
        moved = f"{entry['moved']:,} of {entry['units']:,} units moved"
        click.echo(f"aligned: {printable(entry['model'])}: {entry['kind']} in {entry['layers']} layers, {moved}")
    if report.adapter is not None:
        least, kept = report.adapter["least"], report.adapter["kept_energy"]
        click.echo(
            f"kept {kept:.2%} of the energy over {report.adapter['modules']} modules; least in "
            f"{printable(least['module'])}, {least['kept_energy']:.2%}"
        )
    if report.nonfinite or report.overflow:
        click.echo(f"allowed by the recipe: {report.nonfinite:,} non-finite values, {report.overflow:,} overflows")


def check_device(device: str) -> None:
    """Raises UsageError for a device that this machine does not have."""
    from merge.errors import UsageError

    if device == "cpu":
        return
    match = re.fullmatch(r"cuda(:\d{1,4})?", device)
    if match is None:
        raise UsageError(f'--device "{device}": expected cpu, cuda or cuda:N.')
    import torch

    if not torch.cuda.is_available():
        raise UsageError(
            "--device cuda: torch finds no GPU here (a CPU build of torch, or no driver). Use --device cpu."
        )
    count = torch.cuda.device_count()
    if match[1] and int(match[1][1:]) >= count:
        raise UsageError(f"--device {device}: torch finds {count} here, numbered from cuda:0.")
