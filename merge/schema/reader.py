"""Nodes of a YAML file, or of flags -> typed values by a table of keys; collects all problems.

The reader continues after a problem: it notes the place, returns the usable rest, and remembers which keys were
`broken`, so that later checks do not report consequences.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, TypeVar

import yaml

from merge.errors import Problem, RecipeError
from merge.quoting import clipped
from merge.schema.document import line_of, place
from merge.schema.keys import Key
from merge.schema.names import suggest
from merge.schema.scalars import NULL, STR, as_boolean, as_integer, as_number, shown

_MERGE = "tag:yaml.org,2002:merge"
_TEXT, _BOOLEAN = Key("str"), Key("bool")
_READERS = {"str": "text", "int": "integer", "float": "number", "bool": "boolean"}  # kind -> method of Reader
Number = TypeVar("Number", int, float)
MAX_PROBLEMS = 1000  # then reading ends, because each message takes time to find the nearest name
MAX_KEY = 300  # characters; every value below a key is noted with the path to it


class Reader:
    """State of one parse. `lines`: key path -> the line where it is written."""

    def __init__(self, file: str | None) -> None:
        self.file = file
        self.lines: dict[str, int] = {}
        self.broken: set[str] = set()  # only for look-up, never iterated
        self._flag: str | None = None
        self._problems: list[tuple[int, Problem]] = []

    # ---- problems

    def problem(self, at: yaml.Node | int, message: str, broken: str | None = None) -> None:
        line = 0 if self._flag is not None else at if isinstance(at, int) else line_of(at)
        self._problems.append((line, Problem(message, self._flag or place(self.file, line))))
        if broken is not None:
            self.broken.add(broken)
        self._end_if_many()

    @contextlib.contextmanager
    def at_flag(self, flag: str | None) -> Iterator[None]:
        """A context in which problems name a flag of the command, if one is given, instead of a line."""
        before, self._flag = self._flag, flag
        try:
            yield
        finally:
            self._flag = before

    def add(self, problems: Iterable[Problem]) -> None:
        """Adds problems found elsewhere, sorted by the line that they name, or at the end."""
        for problem in problems:
            file, _, line = (problem.where or "").rpartition(":" if self.file is not None else " ")
            known = file == (self.file or "line") and line.isdigit()
            self._problems.append((int(line) if known else sys.maxsize, problem))

    def take_problems(self, part: Reader) -> None:
        """Adds the problems of a reader for a part of the same file."""
        self._problems += part._problems
        self._end_if_many()

    def _end_if_many(self) -> None:
        if len(self._problems) > MAX_PROBLEMS:
            line = self._problems[-1][0]
            said = f"more than {MAX_PROBLEMS:,} problems; the rest of the file was not read"
            self._problems[-1] = (line, Problem(said, place(self.file, line)))
            self.raise_if_any()

    @property
    def n_problems(self) -> int:
        return len(self._problems)

    def raise_if_any(self) -> None:
        """Raises RecipeError with every problem, in the file's order, each once."""
        if self._problems:
            ordered = sorted(self._problems, key=lambda found: found[0])
            raise RecipeError(list(dict.fromkeys(problem for _, problem in ordered)), self.advice())

    def advice(self) -> list[str]:
        """Lines to print below the problems."""
        return []

    def line(self, path: str) -> int:
        """The line of `path`, or of the nearest key around it."""
        while path and path not in self.lines:
            path = path.rpartition(".")[0]
        return self.lines.get(path, 1)

    # ---- nodes

    def pairs(self, node: yaml.Node, path: str, what: str) -> Iterator[tuple[str, yaml.Node, yaml.Node]]:
        """(key, its node, value) with merge keys (`<<`) written out; notes lines; a key given twice is a problem."""
        if not isinstance(node, yaml.MappingNode):
            self.problem(node, f"{what} must be a mapping of keys to values, not {shown(node)}", path)
            return
        first: dict[str, int] = {}
        merged: list[yaml.Node] = []
        for key_node, value in node.value:
            if not isinstance(key_node, yaml.ScalarNode):
                self.problem(key_node, f"a key must be a word, not {shown(key_node)}", path)
            elif key_node.tag == _MERGE:
                merged += value.value if isinstance(value, yaml.SequenceNode) else [value]
            elif len(key_node.value) > MAX_KEY:
                self.problem(key_node, f"a key has at most {MAX_KEY:,} characters, not {clipped(key_node.value)}", path)
            elif key_node.value in first:
                line = first[key_node.value]
                self.problem(key_node, f'key "{key_node.value}" is given twice in {what}; first on line {line}')
            else:
                first[key_node.value] = line_of(key_node)
                self.lines.setdefault(join(path, key_node.value), line_of(key_node))
                yield key_node.value, key_node, value
        for part in merged:
            for key, key_node, value in self.pairs(part, path, "what << merges in"):
                if key not in first:
                    first[key] = line_of(key_node)
                    yield key, key_node, value

    def fields(
        self,
        node: yaml.Node,
        path: str,
        keys: Mapping[str, Key],
        what: str,
        unknown: Callable[[str, yaml.Node, yaml.Node], None] | None = None,
    ) -> Fields:
        """A mapping, read by the table of its keys, without those that are null.

        Args:
            unknown: called with a key that is not in the table, its node and its value; by default that is a problem.
        """
        found = Fields(self, path, keys)
        for key, key_node, value in self.pairs(node, path, what):
            if key in keys:
                if value.tag != NULL:
                    found[key] = value
            elif unknown is not None:
                unknown(key, key_node, value)
            else:
                self.problem(key_node, f'unknown key "{key}"; {suggest(key, keys)}')
        return found

    def items(self, node: yaml.Node | None, path: str) -> list[yaml.Node]:
        """The items of a list; [] with a problem for anything else."""
        if node is None:
            return []
        if not isinstance(node, yaml.SequenceNode):
            self.problem(node, f'"{_name(path)}" must be a list, not {shown(node)}', path)
            return []
        for i, item in enumerate(node.value):
            self.lines[join(path, str(i))] = line_of(item)
        return list(node.value)

    # ---- values; None if nothing is written, or if it is wrong: then `broken` has the path

    def value(self, node: yaml.Node, path: str, key: Key) -> Any:
        """The value of the key's kind."""
        return getattr(self, _READERS.get(key.kind, key.kind))(node, path, key)

    def text(self, node: yaml.Node | None, path: str, key: Key = _TEXT) -> str | None:
        """A string, one of the choices if there are any."""
        if node is None:
            return None
        if isinstance(node, yaml.ScalarNode) and (node.tag == STR or "timestamp" in node.tag) and node.value.strip():
            text = str(node.value)
            if not key.choices or text in key.choices:
                return text
            self.problem(node, f'unknown {key.noun or _name(path)} "{text}"; {suggest(text, key.choices)}', path)
            return None
        odd = isinstance(node, yaml.ScalarNode) and node.tag not in (NULL, STR)
        hint = f'; quote it: "{clipped(node.value)}"' if odd else ""
        self.problem(node, f'"{_name(path)}" must be a string, not {shown(node)}{hint}', path)
        return None

    def integer(self, node: yaml.Node | None, path: str, key: Key) -> int | None:
        value = None if node is None else as_integer(node)
        return self._within(value, node, path, "whole number", key)

    def number(self, node: yaml.Node | None, path: str, key: Key) -> float | None:
        value = as_number(node) if isinstance(node, yaml.ScalarNode) else None
        return self._within(value, node, path, "number", key)

    def _within(self, value: Number | None, node: yaml.Node | None, path: str, what: str, key: Key) -> Number | None:
        if value is not None and key.holds(value):
            return value
        if node is not None:
            wanted = f"{what} {key.span}".rstrip()
            self.problem(node, f'"{_name(path)}" must be a {wanted}, not {shown(node)}', path)
        return None

    def boolean(self, node: yaml.Node | None, path: str, key: Key = _BOOLEAN) -> bool | None:
        value = as_boolean(node) if isinstance(node, yaml.ScalarNode) else None
        if node is not None and value is None:
            self.problem(node, f'"{_name(path)}" must be true or false, not {shown(node)}', path)
        return value

    def words(self, node: yaml.Node | None, path: str, key: Key) -> tuple[str, ...] | None:
        """A list of strings, each one of the choices if there are any; a single one needs no brackets."""
        items = [node] if isinstance(node, yaml.ScalarNode) else self.items(node, path)
        words = [self.text(item, path, key) for item in items]
        return None if path in self.broken else tuple(word for word in words if word is not None)

    def table(self, node: yaml.Node, path: str, key: Key) -> dict[str, float] | None:
        found = {
            name: self.number(value, join(path, name), key) for name, _, value in self.pairs(node, path, f'"{path}"')
        }
        numbers = {name: value for name, value in found.items() if value is not None}
        return numbers if found and len(numbers) == len(found) else None


class Fields(dict[str, yaml.Node]):
    """The nodes of one mapping, read by the table of its keys."""

    def __init__(self, reader: Reader, path: str, keys: Mapping[str, Key]) -> None:
        super().__init__()
        self._reader, self._path, self._keys = reader, path, keys

    def at(self, name: str) -> tuple[yaml.Node | None, str]:
        """(node, path): the first arguments of the reader's methods"""
        return self.get(name), join(self._path, name)

    def value(self, name: str) -> Any:
        return self._reader.value(self[name], join(self._path, name), self._keys[name])

    def text(self, name: str) -> str | None:
        return self._reader.text(*self.at(name), self._keys[name])

    def integer(self, name: str) -> int | None:
        return self._reader.integer(*self.at(name), self._keys[name])

    def number(self, name: str) -> float | None:
        return self._reader.number(*self.at(name), self._keys[name])

    def boolean(self, name: str) -> bool | None:
        return self._reader.boolean(*self.at(name))


def join(path: str, key: str) -> str:
    return f"{path}.{key}" if path else key


def _name(path: str) -> str:
    return path.rpartition(".")[2]
