"""A journal: one line of JSON for each thing that is done, each with a digest, so that a line cut short is noticed."""

from __future__ import annotations

import json
import os
import threading
from pathlib import Path
from typing import Any

import xxhash

from merge.jsontext import parse_json


class Journal:
    """Appends lines to a file, from any thread. Raises OSError.

    Args:
        whole: bytes of the file to go on after; see read_journal.
    """

    def __init__(self, path: Path, whole: int) -> None:
        self._file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        os.truncate(self._file, whole)
        self._lock = threading.Lock()

    def append(self, *lines: dict[str, Any]) -> None:
        texts = [json.dumps(line, separators=(",", ":")) for line in lines]
        data = "".join(f'["{_seal(text)}",{text}]\n' for text in texts).encode()
        with self._lock:
            while data:
                data = data[os.write(self._file, data) :]

    def close(self) -> None:
        os.close(self._file)


def read_journal(path: Path) -> tuple[list[dict[str, Any]], int]:
    """The whole lines of a journal and their length in bytes; a line that a kill cut short ends it."""
    lines: list[dict[str, Any]] = []
    whole = 0
    data = path.read_bytes() if path.exists() else b""
    for text in data.split(b"\n")[:-1]:
        try:
            seal, line = parse_json(text)
        except (ValueError, TypeError):
            break
        if not isinstance(line, dict) or seal != _seal(json.dumps(line, separators=(",", ":"))):
            break
        lines.append(line)
        whole += len(text) + 1
    return lines, whole


def _seal(text: str) -> str:
    return xxhash.xxh3_64_hexdigest(text.encode())
