"""OUT.partial during training, and OUT when complete: see merge/output/workspace.py.

Besides the lock and result/, which becomes OUT, it holds the checkpoints and run.json: the config and digests of the
run, since no other run may resume there.
"""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from merge.errors import MergeError, UsageError
from merge.jsontext import parse_json
from merge.output.directory import Sources, explained, sync, sync_directory, write_whole
from merge.output.workspace import Workspace
from merge.quoting import some

RUN = "run.json"


class TrainingDirectory:
    """Context manager; on an exception OUT.partial stays for the next run. Of several processes only the first acts.

    Attributes:
        finished: the report of the same run, if it was killed during its final clean-up.
    """

    def __init__(
        self, out: Path, identity: dict[str, object], force: bool, first: bool = True, sources: Sources = ()
    ) -> None:
        self._work = Workspace(out, RUN, "merge finetune", identity, force=force, sources=tuple(sources))
        self.identity, self.force, self.first = identity, force, first
        self.partial, self.result = self._work.partial, self._work.result
        self.finished: dict[str, Any] | None = None

    def __enter__(self) -> TrainingDirectory:
        if self.first:
            with contextlib.ExitStack() as stack:
                self.finished = stack.enter_context(self._work).finished
                if self.finished is None:
                    with explained(self.partial):
                        self._claim()
                stack.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.first:
            self._work.__exit__(kind, error, trace)

    def _claim(self) -> None:
        file = self.partial / RUN
        begun = file.exists()
        if begun and (error := self._other_work(file)):
            if not self.force:
                raise error
            begun = False
        if not begun:
            self._work.clear()
            write_whole(file, json.dumps(self.identity, indent=1).encode())
        if self.result.exists():  # killed while it was being written
            shutil.rmtree(self.result)

    def _other_work(self, file: Path) -> MergeError | None:
        """The error if the unfinished work that run.json describes is not this training."""
        now = json.loads(json.dumps(self.identity))
        try:
            before = parse_json(file.read_bytes())
            asked, sources = (_differences(before[key], now[key]) for key in ("config", "sources"))
            others = _differences(before, now)
        except (OSError, ValueError, KeyError, AttributeError, TypeError):
            asked, sources, others = ["an unreadable run.json"], [], []
        if sources and not asked:
            return self._work.stale(some(sources))
        different = sorted(asked + [name for name in others if name not in ("config", "sources")])
        if not different:
            return None
        return UsageError(
            f"{self.partial} holds unfinished training that differs in: {', '.join(different)}. Run that one to finish "
            "it, delete the directory, or use --force to start over."
        )

    def complete(self, report: Mapping[str, object]) -> None:
        """Gives the result its name and removes the rest; `report`: see Workspace."""
        with explained(self.partial):
            for path in sorted(self.result.rglob("*")):
                sync(path) if path.is_file() else sync_directory(path)
            sync_directory(self.result)
        self._work.complete(report)


def _differences(before: dict[str, object], now: dict[str, object]) -> list[str]:
    return sorted(name for name in {**before, **now} if before.get(name) != now.get(name))
