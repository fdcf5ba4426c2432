"""Model references: a local directory, or a hub id `org/name[@revision]`, with `+adapter` after either.

Directories may have `@` and `+` in their path: a text that names an existing directory is that directory. Other
texts are split, at the last `+` and then at the last `@`. A relative path is looked for in the current working
directory first and then beside the recipe.
"""

from __future__ import annotations

import itertools
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from merge.quoting import clipped
from merge.recipe.model import ModelRef
from merge.schema.names import nearest

STAGE = "stage:"  # begins the path of a reference to another document's result; no hub id has a colon
GGUF = ".gguf"  # ends the name of a file that is a whole model
NO_ADAPTER = (
    '"{0}" is another document, and adapters cannot be added to its result ("{1}"); put it on the models merged there'
)
_MAX_HUB_ID = 200  # characters; the hub allows 96
_MOST_SIBLINGS = 100  # directories among which the nearest name is looked for
_MOST_MISSES = 100  # for which the nearest name is looked for
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?", re.ASCII)


def parse_reference(text: str, folder: Path | None = None) -> ModelRef:
    """The text in a recipe -> ModelRef; `folder` is the recipe's. Raises ValueError with a short cause."""
    if not text.strip() or not text.isprintable():
        raise ValueError(f"{clipped(text)!a} is not a model: write a directory or a hub id such as org/name")
    found = _directory(text, folder)
    if found:
        return ModelRef(text, found)
    model, plus, adapter = text.rpartition("+")
    if not plus:
        return parse_model_path(text, folder)
    if _looks_local(model) and "@" not in model and not _directory(model, folder):
        raise ValueError(no_directory(text, folder))
    if not model or not adapter:
        raise ValueError(f'"{text}" has nothing {"after" if model else "before"} its "+": write model+adapter')
    return replace(parse_model_path(model, folder), text=text, adapter=parse_model_path(adapter, folder))


def parse_model_path(text: str, folder: Path | None = None, revision: str | None = None) -> ModelRef:
    """`directory`, `org/name` or `org/name@revision`; `revision` where the recipe wrote it on its own."""
    path, written = text, text if revision is None else f"{text}@{revision}"
    found = _directory(text, folder)
    if not found and revision is None and "@" in text:
        path, _, revision = text.rpartition("@")
        found = _directory(path, folder)
        if not path or not revision:
            raise ValueError(f'"{text}" has nothing {"after" if path else "before"} its "@": write org/name@revision')
    if found:
        if revision is not None:
            raise ValueError(f'"{path}" is a local directory, which has no revision "{revision}"; remove it')
        return ModelRef(written, found)
    if "://" in path:
        raise ValueError(f'"{path}" is a URL; write the hub id, org/name, or a local directory')
    if os.path.isfile(path):
        raise ValueError(_is_file(path))
    if _looks_local(path):
        raise ValueError(no_directory(text, folder))
    if not _HUB_ID.fullmatch(path) or len(path) > _MAX_HUB_ID:
        raise ValueError(f'"{path}" is neither a directory here nor a hub id such as org/name')
    return ModelRef(written, path, revision)


def _directory(text: str, folder: Path | None) -> str | None:
    """The absolute path of the directory, or GGUF file, that `text` names, or None."""
    path = os.path.expanduser(text) if text.startswith("~") else text
    for candidate in (path, os.path.join(folder, path)) if folder else (path,):
        if text and (os.path.isdir(candidate) or (text.endswith(GGUF) and os.path.isfile(candidate))):
            return os.path.abspath(candidate)
    return None


def _is_file(path: str) -> str:
    return f'"{clipped(path)}" is a file; name the model directory that contains it'


def _looks_local(path: str) -> bool:
    """Whether the text cannot be a hub id, so that a missing directory is reported here, with its line."""
    return path.startswith((".", "~")) or os.path.isabs(path) or "\\" in path or path.count("/") > 1


def no_directory(text: str, folder: Path | None) -> str:
    beside = "" if folder is None or os.path.isabs(text) else f', nor beside the recipe in "{folder}"'
    near = similar_directory(text, folder)
    return f'there is no directory "{text}"{beside}' + (f'; did you mean "{near}"?' if near else "")


def similar_directory(text: str, folder: Path | None) -> str | None:
    """The directory that was probably meant: missing parts of the path are replaced by the nearest names."""
    for start in ("", folder or ""):
        found: list[str] = []
        for part in text.split("/"):
            parent = os.path.join(start, os.path.expanduser("/".join([*found, ""]))) or "."
            is_there = part in ("", "~") or os.path.isdir(os.path.join(parent, part))
            near = part if is_there else nearest(part, _directories_in(parent))
            if near is None:
                break
            found.append(near)
        else:
            return "/".join(found)
    return None


def _directories_in(path: str) -> list[str]:
    try:
        with os.scandir(path) as entries:
            first = list(itertools.islice(entries, _MOST_SIBLINGS))
            return sorted(entry.name for entry in first if entry.is_dir() and not entry.name.startswith("."))
    except OSError:
        return []


@dataclass
class StageNames:
    """The names of a pipeline's documents, as one of them sees them; it also collects which ones that document uses.

    Attributes:
        earlier: those before it.
        later: those after it, with the line where each begins; `circular` are those of them that use this one.
        own: its own name.
        used: of `earlier`, those that were asked for, in that order.
        shadowed: of `used`, those that are the names of directories too.
        misses: how many names were looked for without finding a document.
    """

    earlier: tuple[str, ...] = ()
    later: Mapping[str, int] = field(default_factory=dict)
    circular: frozenset[str] = frozenset()
    own: str | None = None
    used: dict[str, None] = field(default_factory=dict)
    shadowed: dict[str, None] = field(default_factory=dict)
    misses: int = 0

    def find(self, text: str, folder: Path | None) -> ModelRef | None:
        """The reference to an earlier document, if `text` is one's name.

        Raises:
            ValueError: the name of a document that cannot be used here, or one that is misspelt.
        """
        if not self.earlier and not self.later and self.own is None:
            return None
        model, plus, _ = text.rpartition("+")
        known = (*self.earlier, *self.later, self.own)
        name = model if plus and text not in known and model in known else text
        if name in self.earlier:
            if name != text:
                raise ValueError(NO_ADAPTER.format(name, text))
            self.used[name] = None
            if _directory(name, folder):
                self.shadowed[name] = None
            return ModelRef(text, STAGE + name)
        if name == self.own:
            raise ValueError(f'"{name}" is the name of this document itself; a directory of that name is "./{name}"')
        if name in self.later:
            if name in self.circular:
                raise ValueError(
                    f'"{name}" (line {self.later[name]}) is made from this document, and this one from it: '
                    "documents cannot form a cycle"
                )
            raise ValueError(
                f'"{name}" is made by a later document (line {self.later[name]}), and a document can use earlier '
                "ones only; move that one before this"
            )
        if "/" in name or "@" in name or _looks_local(name) or _directory(text, folder):
            return None
        self.misses += 1
        near = nearest(name, self.earlier) if self.misses <= _MOST_MISSES else None
        if near is not None:
            raise ValueError(f'"{name}" is neither a directory nor an earlier document; did you mean "{near}"?')
        return None
