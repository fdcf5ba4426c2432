"""The plain fields of a recipe: dtype, name, allow, compat. The reader collects problems."""

from __future__ import annotations

import yaml

from merge.dtypes import RECIPE_NAMES
from merge.errors import UsageError
from merge.recipe.model import ALLOW
from merge.recipe.reader import RecipeReader
from merge.schema.names import suggest
from merge.schema.reader import Fields
from merge.schema.scalars import shown


def read_dtype(reader: RecipeReader, node: yaml.Node | None, path: str) -> str | None:
    text = reader.text(node, path)
    if node is None or text is None:
        return None
    try:
        return stored_dtype(text, path)
    except UsageError as error:
        reader.problem(node, str(error), path)
        return None


def stored_dtype(text: str, key: str = "dtype") -> str:
    """Any common name of a dtype -> its safetensors name. Raises UsageError for an unknown one."""
    found = RECIPE_NAMES.get(text.removeprefix("torch."))
    if found is None:
        raise UsageError(f'unknown {key} "{text}"; {suggest(text, RECIPE_NAMES)}')
    return found


def read_name(reader: RecipeReader, node: yaml.Node | None) -> str | None:
    """The default output directory is ./merged/NAME, so a name is one path component."""
    text = reader.text(node, "name")
    if node is None or text is None:
        return None
    if not is_file_name(text):
        reader.problem(node, f'"name" must be usable as the name of a directory, not {shown(node)}', "name")
    return text


def is_file_name(text: str) -> bool:
    return text not in (".", "..") and "/" not in text and "\\" not in text and text.isprintable()


def read_allow(reader: RecipeReader, node: yaml.Node | None) -> tuple[str, ...]:
    if isinstance(node, yaml.ScalarNode):
        reader.problem(node, f'"allow" must be a list, for example [{next(iter(ALLOW))}], not {shown(node)}')
        return ()
    found: list[str] = []
    for i, item in enumerate(reader.items(node, "allow")):
        text = reader.text(item, f"allow.{i}")
        if text is not None and text not in ALLOW:
            reader.problem(item, f'unknown leniency "{text}" in "allow"; {suggest(text, ALLOW)}')
        elif text is not None and text not in found:
            found.append(text)
    return tuple(found)


def read_compat(reader: RecipeReader, fields: Fields) -> str | None:
    fields.text("compat")
    return reader.compat
