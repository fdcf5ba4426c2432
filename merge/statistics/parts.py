"""A result made in parts: safetensors files in OUT.partial, joined at the end."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from merge.checkpoint.safetensors_file import read_header
from merge.errors import CheckpointError, UsageError
from merge.jsontext import parse_json
from merge.output.directory import explained, sync, write_whole
from merge.output.workspace import Workspace
from merge.plan import SourceFile

RUN = "run.json"


class Parts:
    """The parts that are done. A part appears whole, under its name, or not at all.

    Attributes:
        finished: see Workspace.
        changed: the source files may not be what they were when parts were made; whoever uses a part compares what was
            read of them.
    """

    def __init__(self, work: Workspace, sources: Sequence[SourceFile], fresh: bool) -> None:
        self.work, self.directory = work, work.partial
        self.result, self.finished, self.changed = work.result, work.finished, False
        if self.finished is None:
            self._open([list(file.stamp) for file in sources], fresh)

    def _open(self, files: list[list[int]], fresh: bool) -> None:
        place, identity = self.directory / RUN, self.work.identity
        before = _read(place)
        if before is not None and before.get("identity") != identity:
            if not self.work.force:
                raise UsageError(
                    f"{self.directory} holds unfinished work of another run. Finish that one, delete the directory, "
                    "choose another --out, or use --force to discard it."
                )
            before = None
        if before is None or fresh:
            self.work.clear()
            write_whole(place, json.dumps({"identity": identity, "files": files}).encode())
        else:
            self.changed = before["files"] != files
            for left in (*self.directory.glob("*.new"), *self.directory.glob(".*.new")):
                left.unlink()
            if self.result.exists():
                shutil.rmtree(self.result) if self.result.is_dir() else self.result.unlink()

    def path(self, name: str) -> Path:
        return self.directory / name

    def has(self, name: str) -> bool:
        """Whether a part is there and is whole."""
        try:
            read_header(str(self.path(name)))
        except CheckpointError:
            return False
        return True

    def save(self, name: str, tensors: Mapping[str, object], metadata: Mapping[str, str] | None = None) -> None:
        from safetensors.torch import save_file

        new = self.path(name + ".new")
        with explained(self.directory):
            save_file(dict(tensors), new, None if metadata is None else dict(metadata))
            sync(new)
            os.replace(new, self.path(name))

    def join(self, names: Sequence[str], metadata: Mapping[str, str], into: Path) -> int:
        """Writes the file of all tensors of these parts, in their order; their number."""
        header: dict[str, Any] = {"__metadata__": dict(metadata)}
        spans: list[tuple[Path, int]] = []
        end = 0
        for name in names:
            refs, _ = read_header(str(self.path(name)))
            for ref in refs:
                header[ref.name] = {"dtype": ref.dtype, "shape": ref.shape, "data_offsets": [end, end + ref.nbytes]}
                end += ref.nbytes
            if refs:
                spans.append((self.path(name), refs[0].offset))
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        with explained(self.directory), open(into, "wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            for path, start in spans:
                with open(path, "rb") as part:
                    part.seek(start)
                    shutil.copyfileobj(part, file, 1 << 22)
            file.flush()
            os.fsync(file.fileno())
        return len(header) - 1


@contextmanager
def parts_of(work: Workspace, sources: Sequence[SourceFile] = (), fresh: bool = False) -> Iterator[Parts]:
    """The parts in a workspace; its identity is all that their numbers depend on, but for the contents of `sources`.

    Args:
        sources: files whose state is noted, so that `changed` is known.
        fresh: discard unfinished work.

    Raises:
        UsageError: OUT may not be replaced, or OUT.partial has other work.
    """
    with work:
        with explained(work.partial):
            parts = Parts(work, sources, fresh)
        yield parts


def _read(path: Path) -> dict[str, object] | None:
    try:
        found = parse_json(path.read_bytes())
    except FileNotFoundError:
        return None
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}
