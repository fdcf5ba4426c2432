"""Reads data files into rows: a dict of columns each, with its file and line.

Places are `train.jsonl:12` (a line) or `train.parquet:12` (a row, from 1), for messages and for the loss report.
"""

from __future__ import annotations

import csv
import hashlib
import io
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from merge.errors import UsageError
from merge.jsontext import MAX_MEMORY, parse_json
from merge.quoting import excerpt, quoted, some

_HUB = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")  # org/name
KINDS = (".jsonl", ".json", ".csv", ".tsv", ".parquet", ".txt", ".md")


@dataclass(frozen=True, slots=True)
class Row:
    place: str
    columns: dict[str, Any]


def find_file(text: str, folder: Path | None) -> Path | None:
    """The file, from here or beside the config; None if the text can only be a data set of the hub.

    Raises:
        UsageError: there is none, or it is of no known kind.
    """
    path = Path(text).expanduser()
    if not path.is_file() and folder is not None and (folder / path).is_file():
        path = folder / path
    if path.is_dir():
        raise UsageError(f"data {text}: is a directory; name the files in it.")
    if not path.is_file() and _HUB.fullmatch(text) and path.suffix.lower() not in KINDS and not path.parent.is_dir():
        return None
    if not path.is_file():
        beside = "" if folder is None or path.is_absolute() else f", nor beside the config in {folder}"
        raise UsageError(f"data {text}: there is no such file{beside}.")
    if path.suffix.lower() not in KINDS:
        raise UsageError(f'data {text}: unknown kind of file "{path.suffix}"; known: {", ".join(KINDS)}.')
    return path


def file_digest(path: Path) -> str:
    """sha256 of the bytes, as the Hub shows it."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_rows(path: Path) -> list[Row]:
    """All rows of a file.

    Raises:
        UsageError: the file is empty, damaged, or not of the kind that its name ends with; with file and line.
    """
    kind = path.suffix.lower()
    try:
        if kind == ".parquet":
            rows = list(_parquet(path))
        else:
            text = path.read_text(encoding="utf-8-sig")
            if kind == ".jsonl":
                rows = list(_lines(path, text))
            elif kind == ".json":
                rows = list(_document(path, text))
            elif kind in (".csv", ".tsv"):
                rows = list(_table(path, text, "\t" if kind == ".tsv" else ","))
            else:
                rows = [Row(f"{path}:1", {"text": text})] if text.strip() else []
    except UnicodeDecodeError as error:
        raise UsageError(f"data {path}: not UTF-8 text (byte {error.start}).") from None
    except OSError as error:
        raise UsageError(f"data {path}: cannot be read: {error.strerror or error}.") from None
    if not rows:
        raise UsageError(f"data {path}: holds no examples; it is empty.")
    return rows


def _lines(path: Path, text: str) -> Iterator[Row]:
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            yield _object(f"{path}:{number}", _json(f"{path}:{number}", line))


def _document(path: Path, text: str) -> Iterator[Row]:
    if not text.strip():
        return
    if text.lstrip()[0] == "{" and "\n{" in text.strip():  # lines of JSON under another name
        yield from _lines(path, text)
        return
    value = _json(str(path), text)
    if isinstance(value, dict):  # {"data": [...]} and the like
        lists = [part for part in value.values() if isinstance(part, list)]
        if len(lists) != 1:
            raise UsageError(
                f"data {path}: expected a list of objects, found an object with {some(list(value)) or 'nothing'}."
            )
        value = lists[0]
    if not isinstance(value, list):
        raise UsageError(f"data {path}: expected a list of objects, found {quoted(value)}.")
    for number, item in enumerate(value, 1):
        yield _object(f"{path}:{number}", item)


def _json(place: str, text: str) -> object:
    try:
        return parse_json(text, max_memory=max(MAX_MEMORY, 10 * len(text)))  # a file of examples may be large
    except ValueError as error:
        raise UsageError(f"data {place}: {error}: {quoted(text.strip())}.") from None


def _object(place: str, value: object) -> Row:
    if not isinstance(value, dict):
        raise UsageError(f"data {place}: expected an object of columns, found {quoted(value)}.")
    return Row(place, value)


def _table(path: Path, text: str, delimiter: str) -> Iterator[Row]:
    csv.field_size_limit(2**31 - 1)  # by default 131,072 characters: a long text has more
    reader = csv.DictReader(io.StringIO(text), delimiter=delimiter, strict=True)
    try:
        names = reader.fieldnames or ()
        if twice := next((name for name in names if list(names).count(name) > 1), None):
            raise UsageError(f'data {path}:1: two columns are called "{twice}"; rename one.')
        for row in reader:
            place = f"{path}:{reader.line_num}"
            if None in row or None in row.values():
                raise UsageError(f"data {place}: expected {len(reader.fieldnames or ())} columns as in the first line.")
            yield Row(place, dict(row))
    except csv.Error as error:
        raise UsageError(f"data {path}:{reader.line_num}: not valid CSV ({error}).") from None


def _parquet(path: Path) -> Iterator[Row]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise UsageError(f"data {path}: parquet needs pyarrow: pip install 'merge-workbench[finetune]'.") from None
    try:
        table = pyarrow.parquet.read_table(path)
    except pyarrow.ArrowException as error:
        raise UsageError(f"data {path}: not a parquet file ({excerpt(str(error).splitlines()[0], 120)}).") from None
    for number, row in enumerate(table.to_pylist(), 1):
        yield Row(f"{path}:{number}", row)
