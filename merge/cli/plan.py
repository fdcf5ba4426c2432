"""merge plan: Show what a recipe would do, with memory, disk and all problems; nothing is written."""

from __future__ import annotations

import json
from pathlib import Path

import click

from merge.cli.options import (
    PATH,
    compat_option,
    json_flag,
    keep_stages_option,
    max_ram_option,
    method_file_option,
    shard_size_option,
    stages_dir_option,
    threads_option,
    trust_option,
)
from merge.cli.pipelines import show_stages
from merge.garbage import no_collection
from merge.show.plan import show_plan, totals_of


@click.command(
    "plan",
    epilog="""\b
Examples:
  merge plan recipe.yaml
  merge plan recipe.yaml --tensors
  merge plan recipe.yaml --json > plan.json
docs/recipes.md explains every key of a recipe; `merge methods` lists the methods.""",
)
@click.argument("recipe")
@click.option("-o", "--out", type=PATH, help="Directory for the result.  [default: ./merged/NAME]")
@click.option("--tensors", is_flag=True, help="One line for each tensor, with its resolved parameters.")
@threads_option
@max_ram_option
@click.option("--device", default="cpu", show_default=True, help="cpu or cuda.")
@shard_size_option
@method_file_option
@stages_dir_option
@keep_stages_option
@compat_option
@json_flag("Print the whole plan, or its problems, as JSON.")
@trust_option
@no_collection()
def command(
    recipe: str,
    out: Path | None,
    tensors: bool,
    threads: int | None,
    max_ram: int | None,
    device: str,
    shard_size: int,
    method_files: tuple[Path, ...],
    stages_dir: Path | None,
    keep_stages: bool,
    compat: str | None,
    as_json: bool,
) -> None:
    """Show what RECIPE would do: made from headers and configs only, in a second or two; nothing is written."""
    from merge.codec import encode
    from merge.jobs.pipelines.plan import PipelinePlanner
    from merge.methods.method_file import load_method_file
    from merge.planning.load import load_pipeline

    for file in method_files:
        load_method_file(file)
    planned = PipelinePlanner(load_pipeline(recipe, compat), out, stages_dir, keep_stages, shard_size).planned
    if len(planned) > 1:
        show_stages(planned, (threads, max_ram, device), tensors, as_json)
        return
    plan = planned[0].plan
    totals = totals_of(plan, out or Path("merged") / plan.name, threads, max_ram, device)
    if as_json:
        click.echo(json.dumps({"problems": [], **totals, "plan": encode(plan)}))
        return
    show_plan(plan, totals, tensors)
