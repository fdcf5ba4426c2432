"""The output directory while it is being made: its journal, and tensors at their final offsets in OUT.partial/result.

A run writes every tensor at its final offset and then one line to the journal. Killed and started again, it takes the
tensors whose bytes still match their journal line and computes the rest. The manifest is written last, and then the
directory gets its name (merge/output/workspace.py), so a directory of that name is always whole.
"""

from __future__ import annotations

import contextlib
import json
import threading
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from merge.errors import StaleWork, UsageError
from merge.output.directory import explained, sync_directory, take_lock, write_durably
from merge.output.held import LARGEST, HeldWrites
from merge.output.identity import plan_digest, source_files, stamps
from merge.output.journal import Journal, read_journal
from merge.output.shard_files import ShardFiles
from merge.output.workspace import Workspace
from merge.plan import Plan, Step
from merge.quoting import some

JOURNAL = "journal.jsonl"
SLICE_JOURNALS, SLICE_LOCKS = "slice-*.jsonl", "slice-*.lock"


class OutputDirectory:
    """The sink of a directory, and a context manager.

    On a clean exit without `complete`, or on an exception, OUT.partial stays for the next run.

    Attributes:
        finished: the report of a run like this one that was killed after OUT had got its name; nothing is left to do.
        records: of tensors that a journal says are done, by step.
        notes: other results worth keeping over a kill, such as thresholds of whole models.
        changed: source files that may not be what they were when these were made. They may be equal copies:
            whoever resumes the work compares what was read of them, and then calls `prove`.
    """

    def __init__(
        self,
        plan: Plan,
        out: Path,
        force: bool = False,
        device: str = "cpu",
        *,
        fresh: bool = False,
        last: Callable[[], None] = lambda: None,
        beside_slices: bool = False,
    ) -> None:
        """
        Args:
            fresh: do not go on with unfinished work.
            last: see Workspace.
            beside_slices: do not mind slices (merge.workers.slices) that are being done at this moment.
        """
        self._beside_slices = beside_slices
        self.plan, self.out, self.force, self.device, self._fresh = plan, out, force, device, fresh
        models = [model for each in (plan, *plan.stages) for model in each.models]
        places = [(model.ref, model.path) for model in models]
        places += [(model.ref, file.path) for model in models for file in model.files]  # adapters lie apart
        # A GPU adds in another order, so a CPU must not finish what a GPU began, nor the reverse.
        self._identity = {"plan": plan_digest(plan), "device": device, "files": stamps(plan)}
        self._work = Workspace(out, JOURNAL, "merge run", self._identity, force=force, sources=places, last=last)
        self.partial, self.result = self._work.partial, self._work.result
        self.finished: dict[str, Any] | None = None
        self.records: dict[int, dict[str, Any]] = {}
        self.notes: dict[str, Any] = {}
        self.changed: frozenset[str] = frozenset()
        self._unproven: dict[str, Any] = {}  # notes made when `changed` were other files, perhaps
        self._shards = ShardFiles(self.partial, self.result)
        self._journal: Journal | None = None
        self._threads = threading.local()  # .held: what the thread has not written yet

    @property
    def name(self) -> str:
        return str(self.out)

    @property
    def identity(self) -> dict[str, Any]:
        """What the work follows from, as journals begin with it: "plan" is the plan's digest."""
        return dict(self._work.identity)

    @property
    def held_bytes(self) -> int:
        return 0

    def __enter__(self) -> OutputDirectory:
        with contextlib.ExitStack() as stack:
            stack.enter_context(self._work)
            stack.callback(self._close)
            self.finished = self._work.finished
            if self.finished is None:
                with explained(self.partial):
                    self._open()
            self._stack = stack.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.__exit__(kind, error, trace)

    def _close(self) -> None:
        self._shards.close()
        if self._journal is not None:
            self._journal.close()
            self._journal = None

    def check(self) -> None:
        """Raises UsageError if `out` exists and may not be replaced, or OUT.partial belongs to something else."""
        self._work.check()

    def _open(self) -> None:
        journal = self.partial / JOURNAL
        lines, whole = read_journal(journal)
        if lines and any(lines[0].get(key) != self._identity[key] for key in ("plan", "device")):
            if not self.force:
                raise UsageError(
                    f"{self.partial} holds unfinished work of another recipe or other options. Run that one to finish "
                    "it, delete the directory, or use --force to start over."
                )
            lines = []
        if not lines or self._fresh:
            lines = []
            self._work.clear()
        self._journal = Journal(journal, whole if lines else 0)
        if not lines:
            self._append(self._identity)
        self._take(lines)
        self._take_slices()
        self.result.mkdir(exist_ok=True)
        for shard in self.plan.shards:
            self._shards.make(shard)

    def _take(self, lines: list[dict[str, Any]]) -> None:
        """Reads what earlier runs journaled."""
        before = self._identity["files"]
        for line in lines:
            if "files" in line:
                before = line["files"]
            elif "step" in line:
                self.records[line["step"]] = line
            else:
                self.notes.update(line)
        now = zip(source_files(self.plan), stamps(self.plan), strict=True)
        self.changed = frozenset(file.path for (file, stamp), old in zip(now, before, strict=True) if stamp != old)
        if self.changed:
            self._unproven, self.notes = self.notes, {}

    def prove(self) -> None:
        """Journals that all earlier work fits the present source files."""
        if self.changed:
            self.changed = frozenset()
            with explained(self.partial):
                self._append({"files": self._identity["files"]})

    def stale(self, what: str) -> StaleWork:
        """See Workspace."""
        return self._work.stale(what)

    def _take_slices(self) -> None:
        """What other processes did of this very plan; see merge.workers.slices.

        Raises:
            OutputError: one of them is at it.
        """
        if not self._beside_slices:
            for path in sorted(self.partial.glob(SLICE_LOCKS)):
                take_lock(self.partial, path.name).release()
        for path in sorted(self.partial.glob(SLICE_JOURNALS)):
            lines, _ = read_journal(path)
            if lines and lines[0] == self.identity:
                self.records.update({line["step"]: line for line in lines[1:]})

    def _append(self, *lines: dict[str, Any]) -> None:
        assert self._journal is not None
        self._journal.append(*lines)

    # While running; called from any thread.

    def write(self, step: Step, element: int, data: memoryview, itemsize: int) -> None:
        """Puts encoded elements of a step at their final place."""
        if self._held is not None and data.nbytes <= LARGEST:
            self._held.hold(step.file, step.offset + element * itemsize, data)
        else:
            self._shards.write(step, element, data, itemsize)

    @property
    def _held(self) -> HeldWrites | None:
        return getattr(self._threads, "held", None)

    @contextlib.contextmanager
    def together(self) -> Iterator[None]:
        """Around tiny steps of one thread: their tensors and journal lines are written in a few calls."""
        self._threads.held = held = HeldWrites()
        try:
            yield
        finally:
            self._threads.held = None
            for file, place, data in held.writes():
                self._shards.put(file, place, data)
            self._finished(held.lines)

    def read_into(self, step: Step, element: int, data: memoryview, itemsize: int) -> None:
        """Reads back what was written, to check it after a resume."""
        self._shards.read_into(step, element, data, itemsize)

    def finish(self, index: int, record: dict[str, Any]) -> None:
        """Journals that a step's tensor is complete."""
        line = {"step": index, **record}
        if self._held is not None:
            self._held.lines.append(line)
        else:
            self._finished([line])

    def _finished(self, lines: list[dict[str, Any]]) -> None:
        if lines:
            with explained(self.partial):
                self._append(*lines)
        self.records.update((line["step"], line) for line in lines)  # readers may rely on the journal from now on

    def keep(self, name: str, value: Any) -> None:
        """Journals a result that is not a tensor."""
        if name in self._unproven and self._unproven[name] != json.loads(json.dumps(value)):
            raise self.stale(some(sorted(self.changed)))
        self.notes[name] = value
        with explained(self.partial):
            self._append({name: value})

    def flushing(self) -> contextlib.AbstractContextManager[None]:
        """Hands written bytes to the disk while the run goes on, so that the closing fsync has little left to do."""
        return self._shards.flushing()

    def complete(
        self, small_files: Mapping[str, bytes], manifest: tuple[str, bytes], report: Mapping[str, Any]
    ) -> None:
        """Writes the small files and, last, the manifest; makes all of it durable; gives the directory its name.

        Args:
            report: see Workspace.
        """
        with explained(self.partial):
            self._shards.sync()
            for name, data in (*small_files.items(), manifest):
                write_durably(self.result / name, data)
            for folder in {(self.result / name).parent for name in (*self._shards.names, *small_files)} | {self.result}:
                sync_directory(folder)
        self._close()
        self._work.complete(report)
