"""Reads nodes of one recipe and collects everything that is wrong with it.

The reader goes on after a problem: it notes the place, gives back what can still be used, and remembers which keys were
`broken`, so that later checks do not complain about what is only a consequence.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import yaml

from merge.errors import Problem, RecipeError
from merge.methods.registry import Method
from merge.quoting import clipped
from merge.recipe import names
from merge.recipe.document import line_of, place
from merge.recipe.model import ModelRef
from merge.recipe.references import StageNames

NULL, _STR, _INT = "tag:yaml.org,2002:null", "tag:yaml.org,2002:str", "tag:yaml.org,2002:int"
_MERGE = "tag:yaml.org,2002:merge"
MAX_PROBLEMS = 1000  # then reading ends: each has its message, with the nearest of the known names looked for
MAX_KEY = 300  # characters; every value below a key is noted with the path to it
MAX_DIGITS = 400  # a number with the parts of 1:1:1... (base 60) takes quadratic time
UNREADABLE = ModelRef("", "")  # stands for a reference that is wrong, so that models are still counted right


class Reader:
    """State of one parse. `lines`: key path -> line, as in Recipe.lines."""

    def __init__(
        self,
        file: str | None,
        methods: dict[str, Method],
        stages: StageNames | None = None,
        compat: str | None = None,
    ) -> None:
        self.file = file
        self.folder = None if file is None else Path(file).parent
        self.methods = methods
        self.stages = stages or StageNames()
        self.method: Method | None = None  # of what is being read: the recipe, a module or a slice
        self.in_use: tuple[Method, ...] = ()  # those that parameters written here may be meant for
        self.lines: dict[str, int] = {}
        self.broken: set[str] = set()  # looked up only, never walked
        self.compat = compat
        self._problems: list[tuple[int, Problem]] = []
        self._ignored: dict[str, list[int]] = {}  # keys that mergekit passes over -> lines

    def problem(self, at: yaml.Node | int, message: str, broken: str | None = None) -> None:
        line = at if isinstance(at, int) else line_of(at)
        self._problems.append((line, Problem(message, place(self.file, line))))
        if broken is not None:
            self.broken.add(broken)
        self._end_if_many()

    def take_problems(self, part: Reader) -> None:
        """Those of a reader that has read a part of the same file."""
        self._problems += part._problems
        self._end_if_many()

    def _end_if_many(self) -> None:
        if len(self._problems) > MAX_PROBLEMS:
            line = self._problems[-1][0]
            said = f"more than {MAX_PROBLEMS:,} problems; the rest of the file was not read"
            self._problems[-1] = (line, Problem(said, place(self.file, line)))
            self.raise_if_any()

    def ignored(self, at: yaml.Node, key: str, message: str, broken: str | None = None) -> None:
        """A key that nothing reads, and that mergekit passes over: a note with `compat: mergekit`, else a problem."""
        self._ignored.setdefault(key, []).append(line_of(at))
        if self.compat is None:
            self.problem(at, message, broken)

    def notes(self) -> tuple[str, ...]:
        """What `compat: mergekit` passed over."""
        return (f"compat: mergekit: ignored {self._ignored_keys()}",) if self.compat and self._ignored else ()

    def _ignored_keys(self) -> str:
        """`"weight" (lines 4 and 6), "normalize" (line 9)`"""
        listed = []
        for key, lines in sorted(self._ignored.items(), key=lambda item: min(item[1])):
            numbers = [str(line) for line in sorted(dict.fromkeys(lines))]
            listed.append(f'"{key}" ({"line" if len(numbers) == 1 else "lines"} {one_of(numbers, "and")})')
        return ", ".join(listed)

    def add(self, problems: Iterable[Problem]) -> None:
        """Takes in what was found elsewhere; it stands at the line that it names, or at the end."""
        lines = {place(self.file, line): line for line in (*self.lines.values(), 1)}
        self._problems += [(lines.get(problem.where, sys.maxsize), problem) for problem in problems]

    @property
    def is_wrong(self) -> bool:
        return bool(self._problems)

    def raise_if_any(self) -> None:
        """Raises RecipeError with every problem, in the recipe's order, each once."""
        if not self._problems:
            return
        ordered = sorted(self._problems, key=lambda found: found[0])
        problems = list(dict.fromkeys(problem for _, problem in ordered))
        does = '"compat: mergekit" in the recipe, or --compat mergekit, does so too and notes it'
        advice = f"{place(self.file, None) or 'the recipe'}: mergekit ignores {self._ignored_keys()}; {does}"
        raise RecipeError(problems, [advice] if self._ignored and self.compat is None else [])

    def line(self, path: str) -> int:
        """The line of `path`, or of the nearest key around it."""
        while path and path not in self.lines:
            path = path.rpartition(".")[0]
        return self.lines.get(path, 1)

    @contextlib.contextmanager
    def scope(self, *methods: Method | None) -> Iterator[None]:
        """Reads a part of the recipe that these methods, the first of them its own, work on."""
        before = self.method, self.in_use
        self.method = methods[0]
        self.in_use = tuple(dict.fromkeys(method for method in methods if method is not None))
        try:
            yield
        finally:
            self.method, self.in_use = before

    # ---- nodes

    def mapping(self, node: yaml.Node, path: str, level: str) -> dict[str, yaml.Node]:
        """The known keys of a mapping, without those that are null; unknown keys are problems."""
        known = names.KEYS[level]
        values = {}
        for key, key_node, value in self.pairs(node, path, names.LEVELS[level]):
            if key in names.REFUSED.get(level, {}):
                if value.tag != NULL:
                    self.ignored(key_node, key, names.REFUSED[level][key])
            elif key not in known:
                self._unknown(key_node, key, level)
            elif value.tag != NULL:
                values[key] = value
        return values

    def _unknown(self, node: yaml.Node, key: str, level: str) -> None:
        message = names.unknown_key(key, level, self.method)
        parameters = self.method.parameters if self.method and "parameters" in names.KEYS[level] else ()
        known = (*names.KEYS[level], *(parameter.name for parameter in parameters))
        if names.is_ignored_elsewhere(key, known, self.methods):
            self.ignored(node, key, message)
        else:
            self.problem(node, message)

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

    def items(self, node: yaml.Node | None, path: str, what: str) -> list[yaml.Node]:
        """The items of a list; [] with a problem for anything else."""
        if node is None:
            return []
        if not isinstance(node, yaml.SequenceNode):
            self.problem(node, f'"{what}" must be a list, not {shown(node)}', path)
            return []
        for i, item in enumerate(node.value):
            self.lines[join(path, str(i))] = line_of(item)
        return list(node.value)

    def text(self, node: yaml.Node | None, path: str) -> str | None:
        if node is None:
            return None
        if isinstance(node, yaml.ScalarNode) and (node.tag == _STR or "timestamp" in node.tag) and node.value.strip():
            return str(node.value)
        odd = isinstance(node, yaml.ScalarNode) and node.tag not in (NULL, _STR)
        hint = f'; quote it: "{clipped(node.value)}"' if odd else ""
        self.problem(node, f'"{path.rpartition(".")[2]}" must be a string, not {shown(node)}{hint}', path)
        return None

    def integer(self, node: yaml.Node | None, path: str, what: str, low: int, high: int | None = None) -> int | None:
        if node is None:
            return None
        value = as_integer(node)
        if value is not None and low <= value and (high is None or value <= high):
            return value
        span = f"of at least {low}" if high is None else f"from {low} to {high}"
        self.problem(node, f"{what} must be a whole number {span}, not {shown(node)}", path)
        return None

    def reference(self, node: yaml.Node | None, path: str) -> ModelRef | None:
        """A model as it is written: a text, or {model: ..., lora: ...} in which each is a text or {path, revision}."""
        if node is None:
            return None
        if not isinstance(node, yaml.MappingNode):
            text = self.text(node, path)
            return UNREADABLE if text is None else ModelRef(text, text, written="reference", line=line_of(node))
        values = self.mapping(node, path, "reference")
        if "model" not in values:
            self.problem(node, 'a model reference needs the key "model"', path)
        model = self._model_path(values.get("model"), join(path, "model"))
        adapter = self._model_path(values.get("lora"), join(path, "lora"))
        if model is None or UNREADABLE in (model, adapter):
            return UNREADABLE
        text = model.text if adapter is None else f"{model.text}+{adapter.text}"
        override = self.text(values.get("override_architecture"), join(path, "override_architecture"))
        return ModelRef(text, model.path, model.revision, adapter, override, "path", line_of(node))

    def _model_path(self, node: yaml.Node | None, path: str) -> ModelRef | None:
        if node is None:
            return None
        if not isinstance(node, yaml.MappingNode):
            text = self.text(node, path)
            return UNREADABLE if text is None else ModelRef(text, text, written="path")
        values = self.mapping(node, path, "model path")
        text = self.text(values.get("path"), join(path, "path"))
        revision = self.text(values.get("revision"), join(path, "revision"))
        if "path" not in values:
            self.problem(node, 'a model path needs the key "path"', path)
        if text is None:
            return UNREADABLE
        return ModelRef(text if revision is None else f"{text}@{revision}", text, revision, written="path")


def join(path: str, key: str) -> str:
    return f"{path}.{key}" if path else key


def as_integer(node: yaml.Node) -> int | None:
    if not isinstance(node, yaml.ScalarNode) or node.tag != _INT or len(node.value) > MAX_DIGITS:
        return None
    try:
        return int(yaml.constructor.SafeConstructor().construct_yaml_int(node))
    except (ValueError, IndexError):  # !!int before something else
        return None


def shown(node: yaml.Node) -> str:
    """A node as a message names it, on one short line."""
    if isinstance(node, yaml.MappingNode):
        return "a mapping"
    if isinstance(node, yaml.SequenceNode):
        return "a list" if node.value else "an empty list"
    if node.tag == NULL:
        return "nothing"
    text = node.value if len(node.value) <= 40 else node.value[:37] + "..."
    text = text.replace("\n", " ")
    return f'"{text}"' if node.tag == _STR or not text else text


def one_of(words: Sequence[str], last: str = "or") -> str:
    """`a, b or c`"""
    return f" {last} ".join(filter(None, (", ".join(words[:-1]), words[-1])))
