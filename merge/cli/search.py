"""merge search: Find the values of a recipe's open places that score best."""

from __future__ import annotations

import contextlib
import dataclasses
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from merge.cli.judging import judging, judging_options
from merge.cli.options import PATH, json_flag, trust_option
from merge.errors import UsageError, kept_by
from merge.needs import need
from merge.show.terminal import printable

if TYPE_CHECKING:
    from eval.search.judges import Judge
    from eval.search.run import Found, SearchStep
    from eval.search.space import Space

TRIALS = 30

GOALS = ("mean", "worst", "gain", "pareto")
SAMPLERS = ("tpe", "cmaes", "nsga2", "random", "grid")


@click.command(
    "search",
    epilog="""\b
Examples:
  merge search recipes/search.yaml --suite quickstart -o merged/found
  merge search recipe.yaml --tasks mine.jsonl --goal worst --max-fall 1 --trials 100
  merge search genome.yaml --time 3600                  a genome of mergekit-evolve, with its tasks
  merge search recipe.yaml --data text.txt --kl-from big  close to the model big on a text
  merge search recipe.yaml --objective score.py:score   a Python function of a candidate
  merge run merged/found/best.yaml -o merged/best
A place is open where a recipe has {search: [0, 1]}, {int: [1, 8]} or {choice: [ties, linear]} for a value. The same
command resumes a search that was killed; a second process with it shares the work.""",
)
@click.argument("recipe", type=PATH)
@click.option("-o", "--out", required=True, type=PATH, help="Directory for study and results.")
@click.option("--trials", type=click.IntRange(1), help="Trials in all.  [default: 30, or no limit with --time]")
@click.option("--time", "seconds", type=click.FloatRange(0, min_open=True), help="Seconds after which no trial begins.")
@click.option("--sampler", type=click.Choice(SAMPLERS), default="tpe", show_default=True, help="Who proposes trials.")
@click.option("--goal", type=click.Choice(GOALS), default="mean", show_default=True, help="What of the scores counts.")
@click.option("--max-fall", type=click.FloatRange(0), help="No task may fall by more points than this.")
@click.option("--fall-from", metavar="NAME", help="The baseline it may not fall from.  [default: the base]")
@click.option("--baseline", "named", multiple=True, metavar="RECIPE", help="A recipe to compare with; may be repeated.")
@click.option("--objective", metavar="FILE.py:NAME", help="A function of a candidate in place of tasks.")
@click.option("--kl-from", metavar="MODEL", help="Come close to this model on --data: the KL divergence is minimised.")
@click.option(
    "--share",
    type=click.FloatRange(0, 1, min_open=True, max_open=True),
    default=0.5,
    show_default=True,
    help="Share of the items that the search may use; the report uses the others.",
)
@click.option("--points", type=click.IntRange(2), default=5, show_default=True, help="Points of a place in a grid.")
@click.option("--workers", type=click.IntRange(1, 64), default=1, show_default=True, help="Processes on this machine.")
@click.option("--resume", is_flag=True, help="Fail unless there is a search to resume.")
@click.option("--force", is_flag=True, help="Discard a search that is there, and begin again.")
@click.option("--allow-test-set", is_flag=True, help="Allow test sets of leaderboards as the objective.")
@click.option("--only-trials", is_flag=True, hidden=True)  # of a process that --workers starts
@json_flag("Print the result as JSON.")
@judging_options
@trust_option
def command(
    recipe: Path,
    out: Path,
    trials: int | None,
    seconds: float | None,
    sampler: str,
    goal: str,
    max_fall: float | None,
    fall_from: str | None,
    named: tuple[str, ...],
    objective: str | None,
    kl_from: str | None,
    share: float,
    points: int,
    workers: int,
    resume: bool,
    force: bool,
    allow_test_set: bool,
    only_trials: bool,
    as_json: bool,
    **asked: Any,
) -> None:
    """Find the values of the open places of RECIPE that score best, and report on items that chose nothing."""
    from eval.search.objective import SearchGoal
    from eval.search.outputs import prepare, write_outputs
    from eval.search.run import search
    from eval.search.study import grid_of

    need("a search", "search", "optuna", "cmaes", "lm_eval", "accelerate")
    goal_asked = SearchGoal(goal, max_fall=None if max_fall is None else max_fall / 100)  # type: ignore[arg-type]
    with asked_of(recipe, objective, kl_from, share, allow_test_set, asked) as (space, judge, test_sets, weights):
        if not only_trials:
            prepare(out, resume, force)
        limit = trials if trials is not None or seconds is not None or sampler == "grid" else TRIALS
        others = [_started() for _ in range(workers - 1)]
        try:
            found = search(
                space,
                judge,
                out=out,
                trials=limit,
                seconds=seconds,
                sampler=sampler,
                seed=asked["seed"],
                goal=dataclasses.replace(goal_asked, weights=weights, of_raw=bool(weights)),
                fall_from=fall_from,
                named=named,
                grid=grid_of(space, points) if sampler == "grid" else (),
                report=not only_trials,
                say=_nothing if asked["quiet"] else _say,
            )
        finally:
            for process in others:
                process.wait()
        if only_trials:
            return
        found = dataclasses.replace(found, test_sets=test_sets)
        written = write_outputs(out, found, judge)
    if as_json:
        click.echo(written["trials"].read_text(encoding="utf-8"), nl=False)
    else:
        _show(found)
        for label, file in written.items():
            click.echo(f"{label}: {file}")
    if found.interrupted:
        error = KeyboardInterrupt()
        kept_by(error, out)
        raise error


@contextlib.contextmanager
def asked_of(
    recipe: Path,
    objective: str | None,
    kl_from: str | None,
    share: float,
    allow_test_set: bool,
    asked: dict[str, Any],
) -> Iterator[tuple[Space, Judge, tuple[str, ...], Mapping[str, float]]]:
    """The recipe, its judge, the tasks that are test sets of leaderboards, and the weights that a genome gives tasks.

    Raises:
        UsageError: tasks beside a function, or neither.
    """
    from eval.search.asked import function_of, judge_of_divergence, judge_of_tasks
    from eval.search.genome import open_recipe

    made = open_recipe(recipe)
    given = [f"--{key}" for key in ("suite", "tasks", "data") if asked[key]]
    if objective is not None:
        if given:
            raise UsageError(f"--objective: cannot be combined with {', '.join(given)}.")
        yield made.space, function_of(objective), (), {}
        return
    if kl_from is not None:
        if given != ["--data"]:
            raise UsageError("--kl-from: needs a text, --data FILE, and no tasks besides.")
        how = judging(asked)
        with judge_of_divergence(kl_from, asked["data"], how.settings, how.cache, share) as close:
            yield made.space, close, (), {}
        return
    if not given:
        asked["tasks"] = ",".join(made.tasks)
    how = judging(asked)
    metrics = {} if given else made.metrics
    with judge_of_tasks(how.tasks, how.settings, how.cache, share, allow_test_set=allow_test_set, metrics=metrics) as (
        judge,
        test_sets,
    ):
        yield made.space, judge, test_sets, {} if given else made.weights


def _started() -> subprocess.Popen[bytes]:
    """Another process with this command, which does trials and nothing else."""
    words = [word for word in sys.argv[1:] if word not in ("--force", "--resume")]
    code = "from merge.cli import main; main()"
    return subprocess.Popen(
        [sys.executable, "-c", code, *words, "--workers", "1", "--only-trials", "--quiet"], stdout=subprocess.DEVNULL
    )


def _nothing(step: SearchStep) -> None:
    pass


def _say(step: SearchStep) -> None:
    """A line on stderr for each baseline and trial: its value, the best so far, its gain, and the time left."""
    row = step.row
    text = f"{row.name}: " + (", ".join(f"{value:.4g}" for value in row.values) or "refused")
    if row.state == "stopped":
        text += f" (stopped after {row.asked} of {row.rounds} rounds)"
    if step.best is not None:
        text += f"; best {step.best.values[0]:.4g}, {step.best.name}"
    if row.kind == "trial" and step.total is not None:
        left = step.seconds / max(1, step.mine) * max(0, step.total - step.done)
        text += f"; {step.done} of {step.total}, {left:,.0f} s left"
    click.echo(printable(text), err=True)


def _show(found: Found) -> None:
    """Baselines and best trials on both sides of the items, and what the report says."""
    from rich.table import Table
    from rich.text import Text

    from eval.search.report import verdicts
    from eval.tables import score_table
    from merge.show.terminal import console

    out = console()
    names = found.objective.names(found.tasks)
    chosen = found.front if len(names) > 1 else [found.best] if found.best is not None else []
    shown = [row for row in found.rows if row.kind != "trial"] + [row for row in chosen if row.kind == "trial"]
    table = Table(title="On the items of the search, which it chose by", title_justify="left")
    table.add_column("recipe")
    for name in (*names, *(found.tasks if list(names) != list(found.tasks) else ())):
        table.add_column(Text(name), justify="right")
    for row in shown:
        scores = [score.value for score in row.scores.values()] if list(names) != list(found.tasks) else []
        table.add_row(Text(row.name), *(f"{value:.4g}" for value in (*row.values, *scores)))
    out.print(table)
    if found.report is not None:
        out.print("On the other items, which chose nothing (search: the best recipe):")
        out.print(score_table(found.report, out.width))
    for text in verdicts(found):
        out.print(f"search: {text}.")
