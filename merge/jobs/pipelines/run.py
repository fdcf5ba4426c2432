"""run_pipeline: carries out the stages of a pipeline, written stages before those that read them.

A written stage is an ordinary output with its own journal and manifest. Beside it, STAGES/.NAME.json says which plan it
was made by, from which files; while these and its own are the same it is not made again. A kill anywhere is followed by
the same command: STAGES is removed while OUT.finished (merge/output/workspace.py) still stands beside the result.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import filelock

from merge.codec import decode
from merge.engine import memory
from merge.engine.run import Report, run_plan
from merge.engine.space import bytes_free
from merge.errors import MergeError, OutputError, UsageError
from merge.jobs.build import SHARD_BYTES
from merge.jobs.pipelines.plan import How, PipelinePlanner, StagePlan, stages_dir_of
from merge.jsontext import parse_json
from merge.output.directory import explained, placed, write_whole
from merge.output.identity import plan_digest, stamps
from merge.output.manifest import MANIFEST
from merge.output.verify import verify_output
from merge.output.workspace import settle
from merge.output.writer import OutputDirectory
from merge.plan import SourceFile
from merge.recipe.pipeline import Pipeline

_LOCK = "run.lock"
StageProgress = Callable[[str, int], None]  # (name of the stage, bytes finished over all stages)


@dataclass(frozen=True)
class StageReport:
    """The result of one stage; `report` is None if it was streamed, or unchanged since an earlier run."""

    name: str
    how: How
    directory: str | None
    unchanged: bool
    report: Report | None


def run_pipeline(
    pipeline: Pipeline,
    out: str | os.PathLike[str],
    *,
    threads: int | None = None,
    max_ram: int | None = None,
    device: str = "cpu",
    force: bool = False,
    shard_bytes: int = SHARD_BYTES,
    stages_dir: str | os.PathLike[str] | None = None,
    keep_stages: bool = False,
    progress: StageProgress = lambda name, done: None,
) -> tuple[StageReport, ...]:
    """Carries out a pipeline: the last stage becomes `out`.

    Args:
        out, threads, max_ram, device, force, shard_bytes: as for run_plan and build_plan.
        stages_dir: directory of the stages that cannot be streamed; default `out`.stages.
        keep_stages: write and keep every stage; otherwise written stages are removed at the end.

    Raises:
        MergeError: see merge.errors; finished work stays, and the same call resumes it.
    """
    folder = None if stages_dir is None else Path(stages_dir)
    planner = PipelinePlanner(pipeline, Path(out), folder, keep_stages, shard_bytes)
    return run_planned(planner, threads=threads, max_ram=max_ram, device=device, force=force, progress=progress)


def run_planned(
    planner: PipelinePlanner,
    *,
    threads: int | None = None,
    max_ram: int | None = None,
    device: str = "cpu",
    force: bool = False,
    progress: StageProgress = lambda name, done: None,
) -> tuple[StageReport, ...]:
    """Carries out a pipeline by its plans; arguments and errors are those of `run_pipeline`."""
    planned = planner.planned
    out = planned[-1].directory
    assert out is not None
    folder = planner.stages_dir or stages_dir_of(out)
    _check(planned, out, folder, device, threads, max_ram, force)
    made = [stage for stage in planned if stage.how != "streamed"]
    reports: dict[str, StageReport] = {}
    done = 0
    with _Stages(folder, device, needed=len(made) > 1) as stages:
        remove = functools.partial(stages.remove, () if planner.keep else planned)
        if placed(out) is not None:
            with OutputDirectory(planned[-1].plan, out, force, device, last=remove) as result:
                if result.finished is not None:
                    return _finished(planned, decode(result.finished, Report))
        for stage, before in zip(planner.pipeline.stages, planned, strict=True):
            current = planner.current(stage, before)
            if current.how == "streamed" or current.directory is None:
                reports[current.name] = StageReport(current.name, current.how, None, False, None)
                continue
            is_last = before is planned[-1]
            report = None
            if not is_last and stages.has(current):
                settle(current.directory)
            else:
                stages.begin(current)
                report = run_plan(
                    current.plan,
                    current.directory,
                    threads=threads,
                    max_ram=max_ram,
                    device=device,
                    force=force or current.how == "written",
                    progress=lambda n, name=current.name, before=done: progress(name, before + n),  # type: ignore[misc]
                    last=remove if is_last else functools.partial(stages.finish, current),
                )
            done += sum(step.nbytes for step in current.plan.steps)
            progress(current.name, done)
            if current.how == "written":
                planner.written(current)
            directory = str(current.directory)
            reports[current.name] = StageReport(current.name, current.how, directory, report is None, report)
    return tuple(reports.values())


def _finished(planned: tuple[StagePlan, ...], report: Report) -> tuple[StageReport, ...]:
    """The reports of an earlier call that was killed when only the stages were left to remove."""
    *earlier, last = planned
    reports = [
        StageReport(each.name, each.how, str(each.directory) if each.directory else None, each.how != "streamed", None)
        for each in earlier
    ]
    return (*reports, StageReport(last.name, last.how, str(last.directory), False, report))


def _check(
    planned: tuple[StagePlan, ...],
    out: Path,
    folder: Path,
    device: str,
    threads: int | None,
    max_ram: int | None,
    force: bool,
) -> None:
    """Reports what would stop a later stage before the first one begins."""
    for stage in planned:
        if stage.directory is not None:
            memory.budget(stage.plan, threads, max_ram, device)
            if stage.how == "result" and (stage is planned[-1] or _noted(folder, stage.name) is None):
                OutputDirectory(stage.plan, stage.directory, force).check()
            if stage.how == "written" and os.path.lexists(stage.directory) and _noted(folder, stage.name) is None:
                raise UsageError(
                    f"{stage.directory} exists and was not made by a pipeline; nothing was changed. "
                    "Move it away, or choose another --stages-dir."
                )
    if folder.resolve().is_relative_to(out.resolve()):
        raise UsageError(f"--stages-dir {folder} is inside {out}, where the result will be. Choose another.")
    places = [stage.directory.absolute() for stage in planned if stage.directory is not None]
    for place in places:
        if places.count(place) > 1:
            raise UsageError(f"{place}: two stages would be written there. Rename one, or choose another --out.")
    if placed(out) is not None:  # nothing is left to write
        return
    needed = sum(stage.plan.bytes_written for stage in planned if stage.directory is not None)
    free = bytes_free(out) + sum(_size(stage.directory) for stage in planned[:-1] if stage.directory is not None)
    if free < needed:
        raise OutputError(
            f"{out.absolute().parent}: the pipeline needs {needed:,} bytes for its result and the stages that are "
            f"written, the disk has {free:,} free. Make room, or choose another --out."
        )


def _size(directory: Path) -> int:
    return sum(file.stat().st_blocks * 512 for file in directory.glob("*.safetensors")) if directory.is_dir() else 0


def _note(folder: Path, name: str) -> Path:
    return folder / f".{name}.json"


def _noted(folder: Path, name: str) -> dict[str, object] | None:
    """The record of how a stage was made; None if there is none."""
    try:
        found = parse_json(_note(folder, name).read_bytes())
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) and "plan" in found else None


class _Stages:
    """The directory of written stages, with a record of each. A context manager that one run holds."""

    def __init__(self, folder: Path, device: str, needed: bool) -> None:
        self._folder, self._device, self._needed = folder, device, needed

    def __enter__(self) -> _Stages:
        if self._needed:
            try:
                self._folder.mkdir(parents=True, exist_ok=True)
                self._lock = filelock.FileLock(self._folder / _LOCK)
                self._lock.acquire(timeout=0)
            except filelock.Timeout:
                raise OutputError(
                    f"{self._folder} is in use by another run. Wait for it, or choose another --stages-dir."
                ) from None
            except OSError as error:
                raise OutputError(
                    f"{self._folder}: cannot write: {error.strerror or error}. Choose another --stages-dir."
                ) from error
        return self

    def __exit__(self, *exc: object) -> None:
        if self._needed and self._lock.is_locked:
            self._unlock()

    def _unlock(self) -> None:
        (self._folder / _LOCK).unlink(missing_ok=True)
        self._lock.release()

    def has(self, stage: StagePlan) -> bool:
        """Whether the stage exists, made by the same plan from the same files, and is unchanged."""
        assert stage.directory is not None
        noted = _noted(self._folder, stage.name)
        if noted is None or "files" not in noted or not stage.directory.is_dir():
            return False
        if any(noted.get(key) != value for key, value in self._made_by(stage).items()):
            return False
        if noted["files"] == _files(stage.directory):
            return True
        try:  # written again or copied since: its digests tell
            return (
                _manifest_digest(stage.directory) == noted["manifest"] and not verify_output(stage.directory).problems
            )
        except (MergeError, OSError):
            return False

    def begin(self, stage: StagePlan) -> None:
        """Makes room for a stage that others need."""
        if stage.how == "written" and stage.directory is not None:
            if stage.directory.is_dir() and placed(stage.directory) is None:  # a pipeline's: `_check` made sure
                shutil.rmtree(stage.directory)
            self._write(stage, {})

    def finish(self, stage: StagePlan) -> None:
        assert stage.directory is not None
        self._write(stage, {"files": _files(stage.directory), "manifest": _manifest_digest(stage.directory)})

    def _made_by(self, stage: StagePlan) -> dict[str, object]:
        return {"plan": plan_digest(stage.plan), "device": self._device, "sources": stamps(stage.plan)}

    def _write(self, stage: StagePlan, more: dict[str, object]) -> None:
        known = self._made_by(stage) | more
        with explained(self._folder):
            write_whole(_note(self._folder, stage.name), json.dumps(known).encode())

    def remove(self, planned: tuple[StagePlan, ...]) -> None:
        """Removes what this run wrote there, and only the stages planned here."""
        if not self._needed:
            return
        for stage in planned[:-1]:
            is_ours = stage.how == "written" and _noted(self._folder, stage.name) is not None
            if is_ours and stage.directory is not None and stage.directory.is_dir():
                shutil.rmtree(stage.directory)
            _note(self._folder, stage.name).unlink(missing_ok=True)
        self._unlock()  # while OUT.finished stands: after that, the same command would not come back here
        with contextlib.suppress(OSError):  # something else is in it
            self._folder.rmdir()


def _files(directory: Path) -> dict[str, list[int]]:
    """The state of every file."""
    paths = [path for path in sorted(directory.rglob("*")) if path.is_file()]
    return {path.relative_to(directory).as_posix(): list(SourceFile.now(path).stamp) for path in paths}


def _manifest_digest(directory: Path) -> str:
    return hashlib.sha256((directory / MANIFEST).read_bytes()).hexdigest()
