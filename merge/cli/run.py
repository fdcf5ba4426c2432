"""merge run: Carry out a recipe and write the checkpoint."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from merge.cli.options import (
    PATH,
    check_device,
    compat_option,
    elapsed,
    json_option,
    keep_stages_option,
    max_ram_option,
    method_file_option,
    quiet_option,
    shard_size_option,
    stages_dir_option,
    threads_option,
    trust_option,
)
from merge.cli.pipelines import run_stages
from merge.show.plan import show_report
from merge.show.terminal import progress_bar, show_notes

if TYPE_CHECKING:
    from merge.jobs.pipelines.plan import PipelinePlanner
    from merge.plan import Plan


@click.command(
    "run",
    epilog="""\b
Examples:
  merge run recipe.yaml                        writes ./merged/NAME
  merge run recipe.yaml -o out --shard-size 2GB
  merge run recipe.yaml --threads 4 --max-ram 1GiB
  merge run pipeline.yaml --keep-stages        several documents; later ones use earlier ones
  merge run recipe.yaml --workers ray --address auto
docs/recipes.md explains every key of a recipe; `merge methods` lists the methods.
Interrupted or killed, the same command resumes where it stopped.""",
)
@click.argument("recipe")
@click.option("-o", "--out", type=PATH, help="Directory for the result.  [default: ./merged/NAME]")
@threads_option
@max_ram_option
@click.option(
    "--workers",
    default="threads",
    show_default=True,
    metavar="KIND",
    help="threads, processes:N, or ray:N on a cluster; --threads and --max-ram are then of each worker.",
)
@click.option("--address", help="Ray cluster to join.  [default: RAY_ADDRESS, or a new one on this machine]")
@click.option(
    "--slice",
    "part",
    metavar="I/N",
    help="Do one of N parts of the run, for job arrays on a shared folder; a run without it then completes the result.",
)
@click.option("--device", default="cpu", show_default=True, help="cpu, or cuda to compute on a GPU.")
@shard_size_option
@method_file_option
@stages_dir_option
@keep_stages_option
@compat_option
@click.option("--force", is_flag=True, help="Replace an existing result; discard unfinished work of another recipe.")
@quiet_option
@json_option
@trust_option
def command(
    recipe: str,
    out: Path | None,
    threads: int | None,
    max_ram: int | None,
    workers: str,
    address: str | None,
    part: str | None,
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
    from merge.jobs.pipelines.plan import PipelinePlanner
    from merge.methods.method_file import load_method_file
    from merge.planning.load import load_pipeline

    for file in method_files:
        load_method_file(file)
    planner = PipelinePlanner(load_pipeline(recipe, compat), out, stages_dir, keep_stages, shard_size)
    *earlier, last = planner.planned
    if part is not None:
        _run_part(
            part, planner, {"threads": threads, "max_ram": max_ram, "device": device}, workers, force, quiet, as_json
        )
        return
    options: dict[str, Any] = {"threads": threads, "max_ram": max_ram, "device": device, "force": force}
    if workers != "threads" or address is not None:
        from merge.workers.choose import chosen_workers

        options["carry"] = chosen_workers(
            workers, address=address, threads=threads, max_ram=max_ram, method_files=method_files
        )
    if earlier:
        check_device(device)
        run_stages(planner, options, quiet, as_json)
        return
    show_notes(last.plan.notes, quiet)
    check_device(device)
    run_single(last.plan, out or Path("merged") / last.plan.name, options, quiet, as_json)


def _run_part(
    part: str,
    planner: PipelinePlanner,
    options: dict[str, Any],
    workers: str,
    force: bool,
    quiet: bool,
    as_json: bool,
) -> None:
    """Does one slice of a run and says what is left to do."""
    import re

    from merge.errors import UsageError
    from merge.workers.slices import run_slice

    match = re.fullmatch(r"(\d{1,6})/([1-9]\d{0,5})", part)
    if match is None:
        raise UsageError(f'--slice "{part}": expected I/N, for example 2/8.')
    if workers != "threads" or force:
        raise UsageError(f"--slice: cannot be combined with {'--force' if force else '--workers'}.")
    *earlier, last = planner.planned
    if any(stage.directory is not None for stage in earlier):
        raise UsageError("--slice: this pipeline writes stages first. Run it without --slice, or stage by stage.")
    check_device(options["device"])
    plan, out = last.plan, last.directory
    assert out is not None
    show_notes(plan.notes, quiet)
    size = sum(step.nbytes for step in plan.steps) // int(match[2])
    with progress_bar(f"{plan.name} {part}", size, quiet or not sys.stderr.isatty()) as progress:
        report = run_slice(plan, out, int(match[1]), int(match[2]), progress=progress, **options)
    if as_json:
        click.echo(json.dumps(dataclasses.asdict(report)))
        return
    click.echo(f"{out}: slice {part}, {report.tensors:,} of {report.of_tensors:,} tensors. When all slices are done,")
    click.echo("the same command without --slice completes the result.")


def run_single(plan: Plan, out: Path, options: dict[str, Any], quiet: bool, as_json: bool) -> None:
    """Carries out one plan and prints its report; `options` are run_plan's."""
    from merge.engine.run import run_plan

    with progress_bar(plan.name, sum(step.nbytes for step in plan.steps), quiet or not sys.stderr.isatty()) as progress:
        report = run_plan(plan, out, progress=progress, **options)
    if as_json:
        click.echo(json.dumps(dataclasses.asdict(report)))
        return
    show_report(plan, report, elapsed())
