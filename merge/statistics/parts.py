"""OUT.partial: one safetensors file for each part that is done; the file in the end is all of them in a row."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from merge.checkpoint.safetensors_file import read_header
from merge.errors import CheckpointError, OutputError

RUN = "run.json"


class Parts:
    """The directory of unfinished work. A part appears whole, under its name, or not at all."""

    def __init__(self, out: Path, run: Mapping[str, Any], force: bool) -> None:
        """`run` is everything the numbers depend on; work of another run is not gone on with."""
        self.out, self.directory = out, out.with_name(out.name + ".partial")
        if out.is_dir():
            raise OutputError(f"{out} is a directory. Name a file with -o.")
        if out.exists() and not force:
            raise OutputError(f"{out} exists. Name another file with -o, or replace it with --force.")
        text = json.dumps(run, indent=2, sort_keys=True) + "\n"
        before = self.directory / RUN
        if before.is_file() and before.read_text(encoding="utf-8") != text:
            if not force:
                raise OutputError(
                    f"{self.directory} holds unfinished work of another run. Name another file with -o, or discard it "
                    "with --force."
                )
            shutil.rmtree(self.directory)
        self.directory.mkdir(parents=True, exist_ok=True)
        for left in self.directory.glob("*.new"):
            left.unlink()
        _replace(before, text.encode())

    def path(self, name: str) -> Path:
        return self.directory / name

    def has(self, name: str) -> bool:
        """Whether a part is there and is whole."""
        try:
            read_header(str(self.path(name)))
        except CheckpointError:
            return False
        return True

    def save(self, name: str, tensors: Mapping[str, Any]) -> None:
        from safetensors.torch import save_file

        new = self.path(name + ".new")
        save_file(dict(tensors), new)
        os.replace(new, self.path(name))

    def complete(self, names: list[str], metadata: Mapping[str, str]) -> int:
        """Writes OUT from the parts, in their order, and removes the directory; the number of tensors."""
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
        new = self.path("whole.new")
        with open(new, "wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            for path, start in spans:
                with open(path, "rb") as part:
                    part.seek(start)
                    shutil.copyfileobj(part, file, 1 << 22)
            file.flush()
            os.fsync(file.fileno())
        os.replace(new, self.out)
        shutil.rmtree(self.directory)
        return len(header) - 1


def _replace(path: Path, data: bytes) -> None:
    new = path.with_name(path.name + ".new")
    new.write_bytes(data)
    os.replace(new, path)
