"""Trains several tasks in three ways: run_strategies(load_tasks("tasks.yaml")). Read this file first.

simultaneous  one training on the data of all tasks, mixed by weight
sequential    task after task, each from the one before; scored after every stage, which shows what is forgotten
parallel      each task from the base, in several processes if asked for; then merged by recipes

config.py   YAML -> TaskSet               stages.py   one training each, none of them twice
merges.py   parts of recipes, filled in   score.py    held-out loss and exact match of a model on every task
table.py    results as a table, as JSON, and what was forgotten

OUT/simultaneous, OUT/sequential/1-NAME, OUT/parallel/NAME and OUT/merged/NAME are models or adapters as merge finetune
and merge run write them; OUT/results.json has the scores.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from finetune.models import pick_device, trained_from
from finetune.prepare import Prepared, prepare
from finetune.sources import model_sources
from finetune.strategies.config import TaskSet, load_tasks, mixture
from finetune.strategies.merges import base_of, check_merges, run_merge
from finetune.strategies.score import Scorer, is_adapter
from finetune.strategies.stages import Machine, ProgressBar, TrainingStage, train_stages
from finetune.strategies.table import RESULTS, Result, write_results
from finetune.train import Progress, Say
from merge.errors import kept_by
from merge.loading.libraries import quiet_libraries
from merge.output.directory import LOCK, check_partial, explained, take_lock, write_whole

__all__ = ["Result", "TaskSet", "load_tasks", "run_strategies"]
MARKER = "strategies.json"


@dataclass(frozen=True)
class StrategyRun:
    """Common inputs of strategies. `prepared`: task -> its data and the base, checked."""

    tasks: TaskSet
    prepared: dict[str, Prepared]
    machine: Machine
    scorer: Scorer

    @property
    def adapters(self) -> bool:
        return is_adapter(self.tasks.shared.train)

    def result(self, strategy: str, stage: str, path: Path | None, adapter: bool) -> Result:
        self.machine.say(f"scoring {f'{strategy}: {stage}' if stage else strategy}")
        return Result(strategy, stage, "" if path is None else str(path), self.scorer.score(path, adapter))


@contextlib.contextmanager
def _no_progress(name: str) -> Iterator[Progress]:
    yield lambda step, steps, logs: None


def run_strategies(
    tasks: TaskSet,
    *,
    device: str | None = None,
    threads: int | None = None,
    force: bool = False,
    say: Say = lambda text: None,
    progress: ProgressBar = _no_progress,
) -> list[Result]:
    """Trains, merges and scores the tasks of a task file; writes tasks.out.

    Args:
        device, threads: as finetune(); with workers, threads of each.
        force: train stages again that were trained with other settings.
        say: called with a line to tell the user.
        progress: name of a stage -> a context with the progress of its training.

    Returns:
        The base first, then every model in the order it was made.

    Raises:
        MergeError: as prepare(), finetune() and run_plan(). What is done is kept, and not done again.
    """
    machine = Machine(device, threads, force, say, progress)
    prepared = {task.name: prepare(task.config, tasks.folder) for task in tasks.tasks}
    with quiet_libraries():
        check_merges(tasks.merges, prepared)
    with _directory(tasks.out), quiet_libraries():
        scorer = Scorer(prepared, tasks.folder, pick_device(tasks.shared, device))
        run = StrategyRun(tasks, prepared, machine, scorer)
        results = [run.result("base", "", None, False)]
        for strategy in tasks.strategies:
            results += _STRATEGIES[strategy](run)
        write_results(tasks.out, [task.name for task in tasks.tasks], results)
    return results


def _simultaneous(run: StrategyRun) -> list[Result]:
    out = run.tasks.out / "simultaneous"
    config = dataclasses.replace(mixture(run.tasks), out=str(out))
    train_stages([TrainingStage("simultaneous", prepare(config, run.tasks.folder), run.tasks.folder)], 1, run.machine)
    return [run.result("simultaneous", "", out, run.adapters)]


def _sequential(run: StrategyRun) -> list[Result]:
    results = []
    before: Path | None = None
    names = [task.name for task in run.tasks.tasks]
    outs = [run.tasks.out / "sequential" / f"{number}-{name}" for number, name in enumerate(names, start=1)]
    for number, (name, out) in enumerate(zip(names, outs, strict=True), start=1):
        stage = TrainingStage(
            f"sequential {number}: {name}",
            _after(run.prepared[name], before, out, run.adapters),
            run.tasks.folder,
            tuple(outs[number:]),
        )
        train_stages([stage], 1, run.machine)
        results.append(run.result("sequential", f"{number} {name}", out, run.adapters))
        before = out
    return results


def _after(prepared: Prepared, before: Path | None, out: Path, adapters: bool) -> Prepared:
    """The task's training from the model, or the adapter, of the stage before."""
    config = dataclasses.replace(prepared.config, out=str(out))
    base = prepared.base
    if before is not None and adapters:
        config = dataclasses.replace(config, adapter=str(before))
        base = dataclasses.replace(base, sources=base.sources + model_sources(str(before), str(before)))
    elif before is not None:
        config = dataclasses.replace(config, model=str(before))
        base = trained_from(base, str(before))
    return dataclasses.replace(prepared, config=config, base=base)


def _parallel(run: StrategyRun) -> list[Result]:
    tasks = run.tasks
    outs = {name: tasks.out / "parallel" / name for name in run.prepared}
    merged = {merge.name: tasks.out / "merged" / merge.name for merge in tasks.merges}
    stages = [
        TrainingStage(
            f"parallel: {name}",
            dataclasses.replace(one, config=dataclasses.replace(one.config, out=str(outs[name]))),
            tasks.folder,
            tuple(merged.values()),
        )
        for name, one in run.prepared.items()
    ]
    trained = train_stages(stages, tasks.workers, run.machine)
    results = [run.result("parallel", name, out, run.adapters) for name, out in outs.items()]
    base = base_of(run.prepared)
    for merge in tasks.merges:
        inputs = merge.listed(base, {name: str(out) for name, out in outs.items()}, run.adapters)
        run_merge(merge, base, inputs, merged[merge.name], again=bool(trained), threads=run.machine.threads)
        results.append(run.result("merged", merge.name, merged[merge.name], run.adapters and not merge.fold))
    return results


_STRATEGIES: dict[str, Callable[[StrategyRun], list[Result]]] = {
    "simultaneous": _simultaneous,
    "sequential": _sequential,
    "parallel": _parallel,
}


@contextlib.contextmanager
def _directory(out: Path) -> Iterator[None]:
    """OUT of a config with tasks, locked by one run at a time; only its own files are touched."""
    check_partial(out, MARKER, "merge finetune with tasks")
    with explained(out):
        out.mkdir(parents=True, exist_ok=True)
        lock = take_lock(out)
    try:
        with explained(out):
            write_whole(out / MARKER, json.dumps({"format": 1, "results": RESULTS}).encode() + b"\n")
        yield
    except BaseException as error:
        kept_by(error, out)
        raise
    finally:
        (out / LOCK).unlink(missing_ok=True)
        lock.release()
