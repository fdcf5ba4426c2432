"""Stores answers by the digest of a model's weights, so that no request is sent twice.

One SQLite file. A request's key holds the digest of the model's weights, config and tokenizer, how it is run (dtype,
device, context length), and the whole request (prompt, continuation or generation settings). A changed task makes
other requests, so that task versions need no key of their own. Every answer is stored as it comes: an evaluation that
is killed resumes where it stopped. Several processes may use one file.
"""

from __future__ import annotations

import errno
import json
import os
import sqlite3
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import xxhash

from merge.errors import MergeError, OutputError, UsageError, kept_by
from merge.jsontext import parse_json
from merge.user_cache import user_cache

_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EIO)
_SQLITE_DISK = (sqlite3.SQLITE_FULL, sqlite3.SQLITE_IOERR)
_WAIT = 60.0  # seconds for another process to finish writing
_TOGETHER = 500  # keys in one query
_CHECKED = 1  # earlier answers may be those of weights that started at random, because the checkpoint lacked them
_SCHEMA = """
CREATE TABLE IF NOT EXISTS answers (key BLOB PRIMARY KEY, answer TEXT NOT NULL) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS digests (key BLOB PRIMARY KEY, digest TEXT NOT NULL) WITHOUT ROWID;
"""


def default_path() -> Path:
    """`MERGE_EVAL_CACHE`, or merge-workbench/answers.sqlite in the user's cache directory."""
    named = os.environ.get("MERGE_EVAL_CACHE")
    if named:
        return Path(named)
    return user_cache() / "answers.sqlite"


class Memory:
    """A store of answers, and of digests that are expensive to compute; a context manager."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        """Raises UsageError if the file cannot be made or is something else, OutputError for a full or broken disk."""
        self.path, self._has_stored = Path(path), False
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._connection = sqlite3.connect(self.path, timeout=_WAIT, isolation_level=None)
            self._connection.execute("PRAGMA journal_mode=WAL")
            self._connection.execute("PRAGMA synchronous=NORMAL")  # a power cut may lose only the last answers
            self._connection.executescript(_SCHEMA)
        except (OSError, sqlite3.Error) as error:
            raise self._unusable(error) from error

    def _unusable(self, error: OSError | sqlite3.Error) -> MergeError:
        """UsageError for a file that is not a store, OutputError for a fault of the disk."""
        if isinstance(error, OSError):
            reason, by_disk = error.strerror, error.errno in _DISK
        else:
            reason, by_disk = str(error), getattr(error, "sqlite_errorcode", 0) & 0xFF in _SQLITE_DISK
        if by_disk:
            return OutputError(
                f"{self.path}: answers cannot be remembered ({reason}). Make room, or name another file with --cache; "
                "then run the same command again."
            )
        return UsageError(
            f"{self.path}: cannot be used to remember answers ({reason}). Name another file with --cache, or remove it."
        )

    def __enter__(self) -> Memory:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._connection.close()
        if error is not None and self._has_stored:
            kept_by(error, self.path)

    def answers(self, keys: Iterable[bytes]) -> dict[bytes, Any]:
        """The known answers among these keys."""
        found: dict[bytes, Any] = {}
        wanted = list(dict.fromkeys(keys))
        for start in range(0, len(wanted), _TOGETHER):
            part = wanted[start : start + _TOGETHER]
            marks = ",".join("?" * len(part))
            rows = self._execute(f"SELECT key, answer FROM answers WHERE key IN ({marks})", part)
            found.update((key, parse_json(answer)) for key, answer in rows)
        return found

    def store(self, key: bytes, answer: object) -> None:
        self._execute("INSERT OR REPLACE INTO answers VALUES (?, ?)", (key, json.dumps(answer)))
        self._has_stored = True

    def digest(self, key: bytes) -> str | None:
        rows = self._execute("SELECT digest FROM digests WHERE key = ?", (key,))
        return str(rows[0][0]) if rows else None

    def store_digest(self, key: bytes, digest: str) -> None:
        self._execute("INSERT OR REPLACE INTO digests VALUES (?, ?)", (key, digest))

    def _execute(self, statement: str, values: Sequence[bytes | str]) -> list[Any]:
        """The rows of the result. Raises like the constructor."""
        try:
            return self._connection.execute(statement, values).fetchall()
        except sqlite3.Error as error:
            raise self._unusable(error) from error


def request_key(model: str, settings: Mapping[str, object], kind: str, arguments: Iterable[object]) -> bytes:
    """16 bytes that name one request to one model.

    Args:
        model: digest of its weights, config and tokenizer.
        settings: those that change numbers.
        kind: lm-eval's name of the request: loglikelihood, loglikelihood_rolling or generate_until.
        arguments: the request's.
    """
    text = json.dumps([_CHECKED, model, dict(settings), kind, list(arguments)], sort_keys=True, ensure_ascii=False)
    return xxhash.xxh3_128_digest(text.encode())


def key_of(*parts: object) -> bytes:
    return xxhash.xxh3_128_digest(json.dumps(parts, sort_keys=True, ensure_ascii=False).encode())
