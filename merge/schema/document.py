"""YAML text -> one tree of nodes that know their lines, or one clear error.

Nothing is constructed here: a tag such as `!!python/object` is refused, an alias stays a shared node, and a document
that expands to very many nodes (the "billion laughs") or nests very deeply is refused before anything walks it.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import yaml

from merge.errors import Problem, RecipeError
from merge.quoting import clipped

MAX_BYTES = 1 << 20
MAX_NODES = 100_000  # with every alias written out
MAX_DOCUMENTS = 100
MAX_DEPTH = 64  # libyaml's composer recurses on the C stack, so this is checked on the events, before it runs

# Characters that YAML 1.2 does not call printable; they suggest a binary file.
_NOT_TEXT = re.compile("[^\t\n\r\x20-\x7e\x85\xa0-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")
_PLAIN_TAGS = frozenset(
    f"tag:yaml.org,2002:{name}"
    for name in ("null", "bool", "int", "float", "str", "timestamp", "seq", "map", "merge", "value")
)
_Loader: type[yaml.SafeLoader | yaml.CSafeLoader] = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


@dataclass(frozen=True, slots=True)
class FileKind:
    """A kind of file, for messages.

    Attributes:
        what: its name.
        begins: a line it may begin with.
        needs: the keys it needs.
        tags: YAML tags that are allowed besides the plain ones.
        several: what to do with a file of several documents.
    """

    what: str
    begins: str
    needs: str
    tags: tuple[str, ...] = ()
    several: str | None = None


_VALUE = FileKind("value", "", "")


def line_of(node: yaml.Node) -> int:
    return int(node.start_mark.line) + 1


def place(file: str | None, line: int | None) -> str | None:
    """`file.yaml:7`; `line 7` for a text without a file."""
    if line is None:
        return file
    return f"line {line}" if file is None else f"{file}:{line}"


def read_text(path: Path, kind: FileKind) -> str:
    """The file's text. Raises RecipeError if it is too large, not UTF-8, or not readable."""
    try:
        with open(path, "rb") as stream:
            data = stream.read(MAX_BYTES + 1)
    except OSError as error:
        raise RecipeError(Problem(f"cannot be read: {error.strerror}", str(path))) from error
    if len(data) > MAX_BYTES:
        raise _too_large(str(path), kind)
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        message = f"not UTF-8 text (byte {error.start}); a {kind.what} is a YAML file"
        raise RecipeError(Problem(message, place(str(path), line))) from error


@dataclass(frozen=True, slots=True)
class Document:
    """One YAML document of a file: its tree, its text without the line "---", and its first line."""

    root: yaml.MappingNode
    text: str
    line: int


def read_document(text: str, file: str | None, kind: FileKind) -> yaml.MappingNode:
    """Composes the only document of `text`.

    Raises:
        RecipeError: not text, not YAML, empty, not a mapping, several documents, too large, too deep, too many aliases.
    """
    _check_text(text, file, kind)
    starts = _document_lines(text, file, kind)
    if len(starts) > 1:
        advice = kind.several or f"a {kind.what} is one document"
        raise RecipeError(Problem(f"a second document starts here: {advice}", place(file, starts[1])))
    for document in _documents(text, file, starts, kind):
        return document.root
    raise _empty(file, kind)


def read_documents(text: str, file: str | None, kind: FileKind) -> list[Document]:
    """Composes every document of `text`; raises RecipeError as `read_document`, and for an empty one among several."""
    _check_text(text, file, kind)
    documents = list(_documents(text, file, _document_lines(text, file, kind), kind))
    if not documents:
        raise _empty(file, kind)
    return documents


def _empty(file: str | None, kind: FileKind) -> RecipeError:
    return RecipeError(Problem(f"the {kind.what} is empty; it needs at least {kind.needs}", place(file, None)))


def _check_text(text: str, file: str | None, kind: FileKind) -> None:
    if len(text) > MAX_BYTES:
        raise _too_large(file, kind)
    if found := _NOT_TEXT.search(text):
        line = text.count("\n", 0, found.start()) + 1
        message = f"there is a control character, {found.group()!a}, here; a {kind.what} is a YAML text file"
        raise RecipeError(Problem(message, place(file, line)))


def _documents(text: str, file: str | None, starts: list[int], kind: FileKind) -> Iterator[Document]:
    lines = text.splitlines(keepends=True)
    try:
        for number, root in enumerate(yaml.compose_all(text, Loader=_Loader)):
            _check_tree(root, file, kind)
            first, end = starts[number], (starts[number + 1] if number + 1 < len(starts) else len(lines) + 1)
            if not isinstance(root, yaml.MappingNode):
                raise RecipeError(_not_a_mapping(root, number, first if len(starts) > 1 else None, file, kind))
            dashes = lines[first - 1].startswith("---") and not lines[first - 1][3:].partition("#")[0].strip()
            own = lines[first if dashes else first - 1 : end - 1] if number else lines[: end - 1]
            yield Document(root, "".join(own), first)
    except yaml.MarkedYAMLError as error:
        raise _syntax_error(error, text, file) from error


def _not_a_mapping(root: yaml.Node, number: int, line: int | None, file: str | None, kind: FileKind) -> Problem:
    """line: of the document, if it is one of several"""
    if line is not None and isinstance(root, yaml.ScalarNode) and not root.value:
        return Problem(f"document {number + 1} is empty; remove its line of dashes", place(file, line))
    what = f"the {kind.what}" if line is None else f"document {number + 1}"
    message = f'{what} is not a mapping of keys to values; it begins with lines such as "{kind.begins}"'
    return Problem(message, place(file, line or line_of(root)))


def _too_large(file: str | None, kind: FileKind) -> RecipeError:
    return RecipeError(Problem(f"larger than {MAX_BYTES >> 20} MiB; a {kind.what} is a short YAML file", file))


def _document_lines(text: str, file: str | None, kind: FileKind) -> list[int]:
    """The first line of each document; checks depth and size too, on the parser's events, which do not recurse."""
    depth, nodes = 0, 0
    starts: list[int] = []
    try:
        for event in yaml.parse(text, Loader=_Loader):
            line = 1 if event.start_mark is None else event.start_mark.line + 1
            nodes += isinstance(event, yaml.NodeEvent)
            if nodes > MAX_NODES or len(starts) > MAX_DOCUMENTS:
                most = f"{MAX_NODES:,} values" if nodes > MAX_NODES else f"{MAX_DOCUMENTS} documents"
                raise RecipeError(Problem(f"the {kind.what} holds more than {most}", place(file, line)))
            if isinstance(event, yaml.CollectionStartEvent):
                depth += 1
                if depth > MAX_DEPTH:
                    message = f"the {kind.what} nests deeper than {MAX_DEPTH} levels"
                    raise RecipeError(Problem(message, place(file, line)))
            elif isinstance(event, yaml.CollectionEndEvent):
                depth -= 1
            elif isinstance(event, yaml.DocumentStartEvent):
                starts.append(line)
    except yaml.MarkedYAMLError as error:
        raise _syntax_error(error, text, file) from error
    return starts


def _syntax_error(error: yaml.MarkedYAMLError, text: str, file: str | None) -> RecipeError:
    mark = error.problem_mark or error.context_mark
    parts = [part for part in (error.context, error.problem) if part]
    hint, line = None, None
    if mark is not None:
        line = mark.line + 1
        lines = text.split("\n")
        written = lines[mark.line] if mark.line < len(lines) else ""
        if "\t" in written[: mark.column + 1]:
            hint = "Indent with spaces; YAML does not allow tabs there."
        elif written[: mark.column].rstrip().endswith("*"):
            hint = 'Quote a lone star: "*".'
    return RecipeError(Problem(f"not valid YAML: {', '.join(parts)}.", place(file, line), hint))


def _check_tree(root: yaml.Node, file: str | None, kind: FileKind) -> None:
    """Counts nodes with every alias written out, each node once; refuses loops and tags that ask for code."""
    sizes: dict[int, tuple[int, int]] = {}  # id of node -> (nodes, depth) below and with it

    def measure(node: yaml.Node, level: int) -> tuple[int, int]:
        if id(node) in sizes:
            return sizes[id(node)]
        if node.tag not in _PLAIN_TAGS and not node.tag.startswith(kind.tags):
            raise RecipeError(Problem(f'the YAML tag "{clipped(node.tag)}" is not allowed', place(file, line_of(node))))
        sizes[id(node)] = (MAX_NODES, MAX_DEPTH)  # seen again before its size is known: an alias of a node around it
        count, depth = 1, 1
        for child in _children(node):
            child_count, child_depth = measure(child, level + 1)
            count, depth = count + child_count, max(depth, child_depth + 1)
            if count > MAX_NODES or depth > MAX_DEPTH or level > MAX_DEPTH:
                message = f"the aliases here refer to themselves or expand to more than {MAX_NODES:,} values"
                raise RecipeError(Problem(message, place(file, line_of(node))))
        sizes[id(node)] = (count, depth)
        return count, depth

    measure(root, 0)


def _children(node: yaml.Node) -> list[yaml.Node]:
    if isinstance(node, yaml.MappingNode):
        return [part for pair in node.value for part in pair]
    return list(node.value) if isinstance(node, yaml.SequenceNode) else []


def compose_value(text: str) -> yaml.Node | None:
    """The node of any YAML value within the bounds; None if there is none."""
    try:
        _check_text(text, None, _VALUE)
        _document_lines(text, None, _VALUE)
        root = yaml.compose(text, Loader=_Loader)
        if root is not None:
            _check_tree(root, None, _VALUE)
    except (RecipeError, yaml.YAMLError):
        return None
    return root


def written(node: yaml.Node, flow: bool = False) -> str:
    """The YAML text of a tree, without its comments; `flow`: on one line."""
    if flow:
        text = yaml.serialize(node, Dumper=_OneLine, width=math.inf, allow_unicode=True)
        return str(text).removesuffix("...\n").strip()
    return str(yaml.serialize(node, Dumper=yaml.SafeDumper, width=110, allow_unicode=True))


class _OneLine(yaml.SafeDumper):
    """Writes all collections in brackets."""

    def expect_block_mapping(self) -> None:
        self.expect_flow_mapping()

    def expect_block_sequence(self) -> None:
        self.expect_flow_sequence()


def texts_of(root: yaml.MappingNode) -> dict[str, str]:
    """The keys of a mapping whose values are strings."""
    pairs = [(key, value) for key, value in root.value if isinstance(key, yaml.ScalarNode)]
    return {key.value: value.value for key, value in pairs if value.tag == "tag:yaml.org,2002:str"}
