"""Shared by `merge run` and `merge plan`: recipes of several documents."""

from __future__ import annotations

import dataclasses
import json
import sys
from typing import TYPE_CHECKING, Any

import click

from merge.codec import encode
from merge.show.plan import show_plan, show_report, totals_of
from merge.show.terminal import console, printable, progress_bar

if TYPE_CHECKING:
    from merge.jobs.pipelines.plan import PipelinePlanner, StagePlan


def run_stages(planner: PipelinePlanner, options: dict[str, Any], quiet: bool, as_json: bool) -> None:
    """Carries out a pipeline; `options` are those of run_plan."""
    from merge.jobs.pipelines.run import run_planned

    planned = planner.planned
    by_name = {stage.name: stage for stage in planned}
    if not quiet:
        for stage in planned:
            for note in stage.plan.notes:
                click.echo(f"note: {printable(f'{stage.name}: {note}')}", err=True)
    total = sum(step.nbytes for stage in planned if stage.directory is not None for step in stage.plan.steps)
    with progress_bar(planned[-1].name, total, quiet or not sys.stderr.isatty()) as progress:
        reports = run_planned(planner, progress=lambda name, done: progress(done), **options)
    if as_json:
        click.echo(json.dumps({"stages": [dataclasses.asdict(report) for report in reports]}))
        return
    for report in reports:
        stage = by_name[report.name]
        if report.how == "streamed":
            click.echo(f"{printable(stage.name)}: streamed, {stage.plan.method}")
        elif report.report is None:
            click.echo(f"{printable(stage.name)}: unchanged in {printable(str(stage.directory))}")
        else:
            if report.how == "written":
                click.echo(f"{printable(stage.name)}: written to {printable(str(stage.directory))}")
            show_report(stage.plan, report.report)


def show_stages(
    planned: tuple[StagePlan, ...], limits: tuple[int | None, int | None, str], tensors: bool, as_json: bool
) -> None:
    """Shows the plan of every stage; `limits` are threads, memory and device."""
    totals = [totals_of(stage.plan, stage.directory, *limits) if stage.directory else None for stage in planned]
    if as_json:
        entries = [
            {**_entry(stage), **(found or {}), "plan": encode(stage.plan)}
            for stage, found in zip(planned, totals, strict=True)
        ]
        click.echo(json.dumps({"problems": [], "stages": entries}))
        return
    for number, (stage, found) in enumerate(zip(planned, totals, strict=True), 1):
        show_plan(stage.plan, found, tensors, f"stage {number} of {len(planned)}, ")
        console().print(
            f"stage    {_how(stage, planned)}\n" if stage is not planned[-1] else f"stage    {_how(stage, planned)}"
        )


def _entry(stage: StagePlan) -> dict[str, object]:
    directory = None if stage.directory is None else str(stage.directory)
    return {
        "name": stage.name,
        "how": stage.how,
        "uses": list(stage.uses),
        "directory": directory,
        "reason": stage.reason or None,
    }


def _how(stage: StagePlan, planned: tuple[StagePlan, ...]) -> str:
    users = ", ".join(printable(other.name) for other in planned if stage.name in other.uses)
    if stage.how == "streamed":
        return f"streamed into {users}: computed while that is merged, and not written"
    if stage.how == "written":
        return f"written to {printable(str(stage.directory))} for {users}: {printable(stage.reason)}"
    return f"a result, written to {printable(str(stage.directory))}"
