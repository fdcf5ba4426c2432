"""OUT.partial while training goes on, and OUT once it is whole: see merge/output/workspace.py.

Besides the lock and result/, which becomes OUT, it holds run.json (what is trained on what: another run may not resume
there) and the checkpoints.
"""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from merge.errors import UsageError
from merge.jsontext import parse_json
from merge.output.directory import Sources, explained, sync, sync_directory, write_whole
from merge.output.workspace import Workspace

RUN = "run.json"


class TrainingDirectory:
    """Context manager; on an exception OUT.partial stays for the next run. Of several processes only the first acts.

    Attributes:
        finished: the report of a run like this one that was killed when it had nothing left to do but to tidy up.
    """

    def __init__(
        self, out: Path, identity: dict[str, Any], force: bool, first: bool = True, sources: Sources = ()
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
        if begun and (different := _differences(file, self.identity)):
            if not self.force:
                raise UsageError(
                    f"{self.partial} holds unfinished training that differs in: {', '.join(different)}. Run that one "
                    "to finish it, delete the directory, or use --force to start over."
                )
            begun = False
        if not begun:
            self._work.clear()
            write_whole(file, json.dumps(self.identity, indent=1).encode())
        if self.result.exists():  # a kill while it was written
            shutil.rmtree(self.result)

    def complete(self, report: Mapping[str, Any]) -> None:
        """Gives the result its name and removes the rest; `report`: see Workspace."""
        with explained(self.partial):
            for path in sorted(self.result.rglob("*")):
                sync(path) if path.is_file() else sync_directory(path)
            sync_directory(self.result)
        self._work.complete(report)


def _differences(file: Path, identity: dict[str, Any]) -> list[str]:
    """What has another value in run.json, by name; keys of the config by their own."""
    try:
        before = parse_json(file.read_bytes())
        flat = {**before.pop("config"), **before}
    except (OSError, ValueError, KeyError, AttributeError):
        return ["an unreadable run.json"]
    now = json.loads(json.dumps(identity))
    now = {**now.pop("config"), **now}
    return sorted(name for name in {**flat, **now} if flat.get(name) != now.get(name))
