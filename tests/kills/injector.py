"""Counts the calls that change something below a directory, by any thread, and fails at the n-th.

Python's own calls are seen one by one: a file's bytes when they leave its buffer; a write that is killed leaves half of
them. Libraries that write by themselves (safetensors, torch.save, tokenizers) are one call each, if they are imported,
killed with half a file written; SQLite, a call for each statement. fdatasync is not counted: it is called by the clock.
"""

from __future__ import annotations

import builtins
import errno
import io
import os
import sqlite3
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, NoReturn

Kind = Literal["count", "kill", "full", "broken"]
KILLED = 137
_WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC
_PATHS = ("mkdir", "rmdir", "unlink", "remove", "rename", "replace", "link", "symlink", "truncate", "chmod", "utime")
_GROWING = ("mkdir", "open", "write", "pwrite", "copy", "save", "sqlite", "link", "symlink")
_open, _exit = io.open, os._exit


class Injector:
    """Armed, it stays until the process ends.

    Attributes:
        calls: (name of the call, path relative to the root), in order.
    """

    def __init__(self, root: Path, kind: Kind, point: int = 0) -> None:
        """
        Args:
            root: calls elsewhere are not counted.
            kind: "kill" ends the process at the call; "full" fails it and all later ones that need room with ENOSPC;
                "broken" fails only it, with EIO.
            point: number of the call, from 1.
        """
        self._root, self._kind, self._point = os.path.realpath(root), kind, point
        self._lock = threading.Lock()
        self.calls: list[tuple[str, str]] = []

    def arm(self) -> None:
        for name in _PATHS:
            self._wrap_path(name)
        self._wrap_files()
        self._wrap_descriptors()
        self._wrap_libraries()

    def _at(self, call: str, path: Any, half: Callable[[], object] = lambda: None, dir_fd: int | None = None) -> None:
        """A call that is about to be made; `half` does some of it, for a kill in its midst."""
        place = self._inside(path, dir_fd)
        if place is None:
            return
        with self._lock:
            self.calls.append((call, place))
            number = len(self.calls)
        if number == self._point and self._kind == "kill":
            half()
            _exit(KILLED)
        if number == self._point and self._kind == "broken":
            self._fail(errno.EIO, call, place)
        if self._kind == "full" and number >= self._point and (number == self._point or call in _GROWING):
            self._fail(errno.ENOSPC, call, place)

    def _fail(self, number: int, call: str, place: str) -> NoReturn:
        if call == "sqlite":  # what it makes of such an error
            is_full = number == errno.ENOSPC
            error = sqlite3.OperationalError("database or disk is full" if is_full else "disk I/O error")
            error.sqlite_errorcode = sqlite3.SQLITE_FULL if is_full else sqlite3.SQLITE_IOERR
            raise error
        raise OSError(number, os.strerror(number), place)

    def _inside(self, path: Any, dir_fd: int | None = None) -> str | None:
        """The path relative to the root; None outside of it."""
        if isinstance(path, int):
            path = os.readlink(f"/proc/self/fd/{path}")
        elif dir_fd is not None:
            path = os.path.join(os.readlink(f"/proc/self/fd/{dir_fd}"), os.fspath(path))
        path = os.path.abspath(os.fsdecode(path))
        return os.path.relpath(path, self._root) if path.startswith(self._root + os.sep) else None

    def _wrap_path(self, name: str) -> None:
        real = getattr(os, name)

        def call(path: Any, *others: Any, **keywords: Any) -> Any:
            dir_fd = keywords.get("dir_fd", keywords.get("src_dir_fd"))
            self._at(name, others[0] if name in ("rename", "replace", "link") else path, dir_fd=dir_fd)
            return real(path, *others, **keywords)

        setattr(os, name, call)

    def _wrap_files(self) -> None:
        injector = self

        class Raw(io.FileIO):
            def write(self, data: Any) -> int:
                view = memoryview(data).cast("B")
                injector._at("write", self.fileno(), lambda: io.FileIO.write(self, view[: len(view) // 2]))
                return super().write(view)

            def truncate(self, size: int | None = None) -> int:
                injector._at("truncate", self.fileno())
                return super().truncate(size)

        def opened(
            file: Any,
            mode: str = "r",
            buffering: int = -1,
            encoding: str | None = None,
            errors: str | None = None,
            newline: str | None = None,
            closefd: bool = True,
            opener: Any = None,
        ) -> Any:
            if not set(mode) & set("wax+") or isinstance(file, int) or self._inside(file) is None:
                return _open(file, mode, buffering, encoding, errors, newline, closefd, opener)
            self._at("open", file)
            raw = Raw(file, mode.replace("b", "").replace("t", ""), closefd, opener)
            if buffering == 0:
                return raw
            buffer: Any = io.BufferedRandom(raw) if "+" in mode else io.BufferedWriter(raw)
            if "b" in mode:
                return buffer
            text: Any = io.TextIOWrapper(buffer, encoding, errors, newline, buffering == 1)
            text.mode = mode
            return text

        builtins.open = io.open = opened  # type: ignore[assignment]

    def _wrap_descriptors(self) -> None:
        real_open, write, pwrite, fsync = os.open, os.write, os.pwrite, os.fsync

        def opened(path: Any, flags: int, *others: Any, **keywords: Any) -> int:
            if flags & _WRITES:
                self._at("open", path, dir_fd=keywords.get("dir_fd"))
            return real_open(path, flags, *others, **keywords)

        def written(fd: int, data: Any) -> int:
            view = memoryview(data).cast("B")
            self._at("write", fd, lambda: write(fd, view[: len(view) // 2]))
            return write(fd, data)

        def pwritten(fd: int, data: Any, offset: int) -> int:
            view = memoryview(data).cast("B")
            self._at("pwrite", fd, lambda: pwrite(fd, view[: len(view) // 2], offset))
            return pwrite(fd, data, offset)

        def synced(fd: Any) -> None:
            self._at("fsync", fd if isinstance(fd, int) else fd.fileno())
            fsync(fd)

        os.open, os.write, os.pwrite, os.fsync = opened, written, pwritten, synced  # type: ignore[assignment]
        for name, call, place in (
            ("ftruncate", "truncate", 0),
            ("sendfile", "copy", 0),
            ("copy_file_range", "copy", 1),
            ("pwritev", "pwrite", 0),
            ("posix_fallocate", "pwrite", 0),
        ):
            if hasattr(os, name):
                setattr(os, name, self._of_descriptor(getattr(os, name), call, place))

    def _of_descriptor(self, real: Any, call: str, place: int) -> Any:
        def called(*arguments: Any, **keywords: Any) -> Any:
            self._at(call, arguments[place])
            return real(*arguments, **keywords)

        return called

    def _wrap_libraries(self) -> None:
        for module, name, argument in (
            ("safetensors.torch", "serialize_file", "filename"),
            ("safetensors.numpy", "serialize_file", "filename"),
            ("torch", "save", "f"),
            ("transformers.tokenization_utils_tokenizers", "TokenizersBackend._save_pretrained", "save_directory"),
            ("merge.output.workspace", "exchange", "other"),
        ):
            owner: Any = sys.modules.get(module)
            if owner is None:
                continue
            *path, name = name.split(".")
            for part in path:
                owner = getattr(owner, part)
            setattr(owner, name, self._of_library(getattr(owner, name), name, argument))
        connect = sqlite3.connect
        sqlite3.connect = lambda *a, **k: connect(*a, factory=self._database(), **k)  # type: ignore[assignment]

    def _of_library(self, real: Any, name: str, argument: str) -> Any:
        def called(*arguments: Any, **keywords: Any) -> Any:
            path = keywords[argument] if argument in keywords else arguments[-1 if name == "exchange" else 1]
            if name == "exchange":
                self._at(name, path)
            elif isinstance(path, (str, os.PathLike)):

                def half() -> None:
                    real(*arguments, **keywords)
                    file = os.path.join(path, "tokenizer.json") if os.path.isdir(path) else path
                    os.truncate(file, os.path.getsize(file) // 2)

                self._at("save", path, half)
            return real(*arguments, **keywords)

        return called

    def _database(self) -> type[sqlite3.Connection]:
        injector = self

        class Database(sqlite3.Connection):
            def execute(self, sql: str, *others: Any) -> sqlite3.Cursor:
                if not sql.startswith("SELECT"):
                    name = sqlite3.Connection.execute(self, "PRAGMA database_list").fetchone()[2]
                    injector._at("sqlite", name)
                return super().execute(sql, *others)

        return Database
