"""The plain fields of a recipe: dtype, name, align, allow, donors, compat. What is wrong goes to the reader."""

from __future__ import annotations

import yaml

from merge.dtypes import RECIPE_NAMES
from merge.errors import UsageError
from merge.recipe import names
from merge.recipe.model import ALIGN, ALLOW, COMPAT
from merge.recipe.reader import Reader, shown


def read_dtype(reader: Reader, node: yaml.Node | None, path: str) -> str | None:
    text = reader.text(node, path)
    if node is None or text is None:
        return None
    try:
        return stored_dtype(text, path)
    except UsageError as error:
        reader.problem(node, str(error), path)
        return None


def stored_dtype(text: str, key: str = "dtype") -> str:
    """Any name torch or people use -> the safetensors name. Raises UsageError for another."""
    found = RECIPE_NAMES.get(text.removeprefix("torch."))
    if found is None:
        raise UsageError(f'unknown {key} "{text}"; {names.suggest(text, list(RECIPE_NAMES))}')
    return found


def read_name(reader: Reader, node: yaml.Node | None) -> str | None:
    """The default output directory is ./merged/NAME, so a name is one path component."""
    text = reader.text(node, "name")
    if node is None or text is None:
        return None
    if not is_file_name(text):
        reader.problem(node, f'"name" must be usable as the name of a directory, not {shown(node)}', "name")
    return text


def is_file_name(text: str) -> bool:
    return text not in (".", "..") and "/" not in text and "\\" not in text and text.isprintable()


def read_align(reader: Reader, node: yaml.Node | None) -> str | None:
    text = reader.text(node, "align")
    if node is not None and text is not None and text not in ALIGN:
        reader.problem(node, f'unknown way to align "{text}"; {names.suggest(text, ALIGN)}', "align")
    return text


def read_allow(reader: Reader, node: yaml.Node | None) -> tuple[str, ...]:
    if isinstance(node, yaml.ScalarNode):
        reader.problem(node, f'"allow" must be a list, for example [{next(iter(ALLOW))}], not {shown(node)}')
        return ()
    found: list[str] = []
    for i, item in enumerate(reader.items(node, "allow", "allow")):
        text = reader.text(item, f"allow.{i}")
        if text is not None and text not in ALLOW:
            reader.problem(item, f'unknown leniency "{text}" in "allow"; {names.suggest(text, list(ALLOW))}')
        elif text is not None and text not in found:
            found.append(text)
    return tuple(found)


def read_compat(reader: Reader, node: yaml.Node | None) -> str | None:
    text = reader.text(node, "compat")
    if node is not None and text is not None and text not in COMPAT:
        reader.problem(node, f'unknown compat "{text}"; {names.suggest(text, COMPAT)}', "compat")
    return reader.compat
