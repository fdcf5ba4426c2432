"""A worker's side of a run: what it is told, and how it carries out the steps that it is given."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from merge.checkpoint.reader import SourceReader
from merge.codec import decode
from merge.engine import memory
from merge.engine.carry import by_threads
from merge.engine.context import Context, check_method
from merge.engine.crew import Crew
from merge.engine.find import find_all
from merge.errors import MergeError
from merge.jsontext import parse_json
from merge.methods.method_file import load_method_file
from merge.output.directory import explained, write_whole
from merge.output.identity import plan_digest, source_files
from merge.output.shared import OnDone, SharedShards
from merge.output.writer import OutputDirectory
from merge.plan import Plan

_PLAN, _NOTES = "plan.json", "notes.json"


@dataclass(frozen=True)
class Assignment:
    """What a worker has to know before its first step; plain data for JSON.

    Attributes:
        directory: current directory of the run, from which relative paths count.
        partial: OUT.partial, with the plan, the findings' results and the shards.
        digest: of the plan; a worker that finds another plan refuses.
        durable: have a batch on the disk before it is reported. Needed where workers are other machines: what
            they have not written out, the machine of the run cannot.
    """

    directory: str
    partial: str
    digest: str
    threads: int | None
    max_ram: int | None
    device: str
    method_files: tuple[str, ...]
    durable: bool

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @staticmethod
    def from_json(text: str) -> Assignment:
        return decode(parse_json(text), Assignment)


def write_plan(out: OutputDirectory) -> None:
    """Puts what workers read into OUT.partial."""
    with explained(out.partial):
        write_whole(out.partial / _PLAN, out.plan.to_json().encode("utf-8", "surrogateescape"))
        write_whole(out.partial / _NOTES, json.dumps(out.notes).encode())


class AssignedSteps:
    """Carries out steps of an assignment's plan, as often as it is asked. A context manager.

    Args:
        on_done: called with the number and record of each finished step, from any thread.

    Raises:
        MergeError: as run_plan does; also where the plan is not the one that was assigned.
    """

    def __init__(self, assignment: Assignment, on_done: OnDone) -> None:
        self._assignment, self._on_done = assignment, on_done

    def __enter__(self) -> AssignedSteps:
        given = self._assignment
        os.chdir(given.directory)
        for file in given.method_files:
            load_method_file(Path(file))
        partial = Path(given.partial)
        plan = _read_plan(partial / _PLAN)
        if plan_digest(plan) != given.digest:
            raise MergeError(f"{partial / _PLAN} is not the plan of this run. Delete {partial} and run again.")
        check_method(plan)
        budget = memory.budget(plan, given.threads, given.max_ram, given.device)
        with contextlib.ExitStack() as stack:
            reader = stack.enter_context(SourceReader(source_files(plan)))
            sink = stack.enter_context(SharedShards(plan, partial, self._on_done))
            sink.notes.update(_read(partial / _NOTES))
            self._sink = sink
            self._context = Context(plan, reader, Crew(budget.threads), sink, given.device, budget)
            for before in (True, False):
                find_all(self._context, lambda: None, before_checks=before)
            self._stack = stack.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.__exit__(kind, error, trace)

    def run(self, steps: Sequence[int]) -> None:
        """Carries out steps by their numbers; each is reported when its tensor is whole."""
        plan = self._context.plan
        by_threads(self._context, [(index, plan.steps[index]) for index in steps], lambda: None)
        self._context.reader.check_unchanged()
        if self._assignment.durable:
            self._sink.sync()


def _read_plan(path: Path) -> Plan:
    return Plan.from_json(_text(path))


def _read(path: Path) -> dict[str, Any]:
    return dict(parse_json(_text(path)))


def _text(path: Path) -> str:
    try:
        return path.read_bytes().decode("utf-8", "surrogateescape")
    except OSError as error:
        raise MergeError(
            f"{path}: a worker cannot read it ({error.strerror or error}). Workers need the file system of the run."
        ) from error
