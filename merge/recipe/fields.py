"""The plain fields of a recipe: dtype, name, align, allow, donors, compat. What is wrong goes to the reader."""

from __future__ import annotations

import yaml

from merge.dtypes import RECIPE_NAMES
from merge.recipe import names
from merge.recipe.model import ALIGN, ALLOW, COMPAT, ModelRef
from merge.recipe.reader import UNREADABLE, Reader, shown


def read_dtype(reader: Reader, node: yaml.Node | None, path: str) -> str | None:
    """Any name torch or people use -> the safetensors name."""
    text = reader.text(node, path)
    if node is None or text is None:
        return None
    found = RECIPE_NAMES.get(text.removeprefix("torch."))
    if found is None:
        reader.problem(node, f'unknown {path} "{text}"; {names.suggest(text, list(RECIPE_NAMES))}', path)
    return found


def read_name(reader: Reader, node: yaml.Node | None) -> str | None:
    """The default output directory is ./merged/NAME, so a name is one path component."""
    text = reader.text(node, "name")
    if node is None or text is None:
        return None
    if text in (".", "..") or "/" in text or "\\" in text or not text.isprintable():
        reader.problem(node, f'"name" must be usable as the name of a directory, not {shown(node)}', "name")
    return text


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


def read_donor(reader: Reader, node: yaml.Node | None, key: str, listed: tuple[ModelRef, ...]) -> ModelRef | None:
    """The model of the recipe whose config.json, or tokenizer, the result gets."""
    ref = reader.reference(node, key)
    if ref is None or ref == UNREADABLE or UNREADABLE in listed or ref in listed:
        return ref
    assert node is not None
    known = list(dict.fromkeys(model.text for model in listed))
    reader.problem(node, f'"{key}" must be a model of this recipe, not "{ref.text}"; {names.suggest(ref.text, known)}')
    return None


def read_compat(reader: Reader, node: yaml.Node | None) -> str | None:
    text = reader.text(node, "compat")
    if node is not None and text is not None and text not in COMPAT:
        reader.problem(node, f'unknown compat "{text}"; {names.suggest(text, COMPAT)}', "compat")
    return reader.compat
