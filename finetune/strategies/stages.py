"""Runs the stages of a task file: single trainings in directories of their own, none done twice.

A stage is done if its directory's manifest has the same config, the same data and the same base weights. Before
a stage is trained again, what was made from it (the next of a sequence, merges) is removed, so results stay consistent.
"""

from __future__ import annotations

import multiprocessing
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from finetune.config import from_record
from finetune.keys import KEYS, Config
from finetune.prepare import Prepared, prepare
from finetune.record import MANIFEST
from finetune.sources import weight_digests
from finetune.train import Progress, Say, finetune
from merge.errors import MergeError, OutputError, UsageError
from merge.jsontext import parse_json
from merge.loading import trusted_names, trusting
from merge.output.directory import partial_of
from merge.output.workspace import settle
from merge.processors import openmp_threads
from merge.quoting import counted

if TYPE_CHECKING:
    from multiprocessing.connection import Connection
    from multiprocessing.context import SpawnProcess

ProgressBar = Callable[[str], AbstractContextManager[Progress]]


@dataclass(frozen=True)
class Machine:
    """Where stages are trained, and how progress is reported."""

    device: str | None
    threads: int | None
    force: bool
    say: Say
    progress: ProgressBar


@dataclass(frozen=True)
class TrainingStage:
    """One training. `prepared.config.out` is its directory; `derived`: what was made from its result."""

    name: str
    prepared: Prepared
    folder: Path | None
    derived: tuple[Path, ...] = ()

    @property
    def out(self) -> Path:
        return Path(self.prepared.config.out)


def is_done(stage: TrainingStage, force: bool) -> bool:
    """Whether the stage's directory holds its result.

    Raises:
        UsageError: it holds another one, and may not be replaced.
    """
    if not stage.out.exists():
        return False
    different = _differences(stage)
    if not different:
        return True
    if force:
        return False
    raise UsageError(
        f"{stage.out} holds a training that differs in: {', '.join(different)}. Use --force to train it again, or "
        "choose another out."
    )


def _differences(stage: TrainingStage) -> list[str]:
    try:
        found = parse_json((stage.out / MANIFEST).read_bytes())
        before = from_record(found["config"])
        files, digests = found["data"]["files_sha256"], found["base"]["weights_xxh3_128"]
    except (OSError, ValueError, KeyError, TypeError):
        return ["an unreadable manifest"]
    prepared = stage.prepared
    different = [name for name in KEYS if getattr(before, name) != getattr(prepared.config, name)]
    if files != prepared.data.files:
        different.append("data")
    if digests != weight_digests(prepared.base.path):
        different.append("base weights")
    return list(dict.fromkeys(different))


def train_stages(stages: Sequence[TrainingStage], workers: int, machine: Machine) -> list[TrainingStage]:
    """Trains those that are not done, in several processes if asked for; returns those that it trained.

    Raises:
        MergeError: of the first that failed; what the others have done is kept.
    """
    todo = []
    for stage in stages:
        if is_done(stage, machine.force):
            settle(stage.out)
            machine.say(f"{stage.name}: done before")
        else:
            todo.append(stage)
    for stage in todo:
        for path in stage.derived:
            for made in (path, partial_of(path)):
                if made.exists():
                    shutil.rmtree(made)
    if workers > 1 and len(todo) > 1:
        _train_in_processes(todo, workers, machine)
        return todo
    for stage in todo:
        with machine.progress(stage.name) as progress:
            report = finetune(
                stage.prepared,
                device=machine.device,
                threads=machine.threads,
                force=machine.force,
                say=_named(machine.say, stage.name),
                progress=progress,
            )
        machine.say(f"{stage.name}: {counted(report.steps, 'step')}, {report.seconds:.1f} s")
    return todo


def _named(say: Say, name: str) -> Say:
    return lambda text: say(f"{name}: {text}")


def _train_in_processes(stages: Sequence[TrainingStage], workers: int, machine: Machine) -> None:
    """A new process for each stage, `workers` at a time: torch's threads and memory are a process's own."""

    threads = machine.threads or max(1, openmp_threads() // workers)
    context = multiprocessing.get_context("spawn")
    waiting = list(stages)
    running: dict[str, tuple[SpawnProcess, Connection]] = {}
    failed: list[tuple[str, str, int]] = []
    try:
        while running or (waiting and not failed):
            while waiting and len(running) < workers and not failed:
                stage = waiting.pop(0)
                here, there = context.Pipe(duplex=False)
                settings = (stage.prepared.config, stage.folder, machine.device, threads, machine.force)
                process = context.Process(target=_work, args=(*settings, trusted_names(), there), name=stage.name)
                process.start()
                there.close()
                running[stage.name] = (process, here)
                machine.say(f"{stage.name}: started, {threads} {'thread' if threads == 1 else 'threads'}")
            for name in list(_finished(running)):
                process, here = running.pop(name)
                failed += _outcome(name, process, here, machine.say)
    finally:
        for process, _ in running.values():
            process.terminate()
            process.join()
    if failed:
        name, text, code = failed[0]
        raise (UsageError if code == 2 else OutputError)(f"{name}: {text}")


def _finished(running: dict[str, tuple[SpawnProcess, Connection]]) -> Iterator[str]:
    from multiprocessing.connection import wait

    wait([process.sentinel for process, _ in running.values()])
    for name, (process, _) in running.items():
        if not process.is_alive():
            yield name


def _outcome(name: str, process: SpawnProcess, here: Connection, say: Say) -> list[tuple[str, str, int]]:
    process.join()
    try:
        text, code = here.recv() if here.poll() else (f"its process ended with exit code {process.exitcode}.", 1)
    except EOFError:
        text, code = f"its process ended with exit code {process.exitcode}; out of memory?", 1
    if code == 0:
        say(f"{name}: {text}")
        return []
    return [(name, text, code)]


def _end_with_parent() -> None:
    """A training whose parent was killed would hold its directory against the next one."""
    import os
    from multiprocessing.connection import wait

    parent = multiprocessing.parent_process()
    if parent is not None:
        wait([parent.sentinel])
        os._exit(1)


def _work(
    config: Config,
    folder: Path | None,
    device: str | None,
    threads: int,
    force: bool,
    trusted: tuple[str, ...],
    connection: Connection,
) -> None:
    """In the process: a training, and what became of it in a line."""
    import os
    import threading

    threading.Thread(target=_end_with_parent, daemon=True).start()
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    try:
        with trusting(*trusted):
            report = finetune(prepare(config, folder), device=device, threads=threads, force=force)
    except MergeError as error:
        connection.send((str(error), error.exit_code))
        return
    connection.send((f"{counted(report.steps, 'step')}, {report.seconds:.1f} s", 0))
