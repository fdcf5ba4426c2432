"""YAML -> Recipe: `load_recipe("ties.yaml")`. Strict, and every problem is reported at once with file and line.

document.py    text -> one tree of nodes with lines; size, depth, aliases, tags
reader.py      reads nodes, collects problems
names.py       the keys of each level, and the nearest valid name
references.py  directory, org/name@revision, model+adapter
settings.py    scalars, gradients, conditions, held against the method's signature
build.py       one function a level of the schema
check.py       what needs more than one place: models, base, required parameters
not_yet.py     what is parsed and refused
model.py       the dataclasses, and settings -> one number
"""

from __future__ import annotations

import os
from pathlib import Path

import yaml

from merge.errors import Problem, RecipeError
from merge.methods.registry import all_methods
from merge.recipe import not_yet
from merge.recipe.build import build
from merge.recipe.check import check
from merge.recipe.document import line_of, place, read_document, read_text
from merge.recipe.model import (
    ALLOW,
    Conditional,
    ModelRef,
    Module,
    Recipe,
    Scalar,
    Setting,
    Settings,
    Slice,
    Source,
    evaluate,
    resolve,
)
from merge.recipe.names import nearest
from merge.recipe.reader import Reader
from merge.recipe.references import parse_reference

__all__ = [
    "ALLOW",
    "Conditional",
    "ModelRef",
    "Module",
    "Recipe",
    "Scalar",
    "Setting",
    "Settings",
    "Slice",
    "Source",
    "evaluate",
    "load_recipe",
    "parse_recipe",
    "parse_reference",
    "recipe_of",
    "resolve",
]


def load_recipe(path_or_name: str | Path) -> Recipe:
    """Reads a recipe file.

    Args:
        path_or_name: a file; or its name without `.yaml` or `.yml`, there or in `recipes/`.

    Raises:
        RecipeError: with every problem of the recipe, each with file and line.
    """
    path = _find(Path(path_or_name))
    return parse_recipe(read_text(path), str(path))


def parse_recipe(text: str, file: str | None = None) -> Recipe:
    """A recipe's text -> Recipe.

    Args:
        text: YAML.
        file: its path as messages name it; relative model paths are also looked for beside it.

    Raises:
        RecipeError: with every problem of the recipe, in its order.
    """
    return recipe_of(read_document(text, file), text, file)


def recipe_of(root: yaml.MappingNode, text: str, file: str | None = None) -> Recipe:
    """As parse_recipe, from a tree whose nodes know their lines: a recipe that is a part of another document."""
    for key, _ in root.value:
        if key.value in not_yet.MIXTURE_KEYS:
            raise RecipeError(Problem(not_yet.MIXTURE, place(file, line_of(key))))
    reader = Reader(file, all_methods())
    recipe = build(reader, root, text)
    check(reader, recipe)
    for path, message in not_yet.refusals(recipe):
        reader.problem(reader.line(path), message)
    reader.raise_if_any()
    return recipe


def _find(path: Path) -> Path:
    candidates = [path]
    if path.suffix not in (".yaml", ".yml"):
        candidates += [
            folder / f"{path}{suffix}" for folder in (Path(), Path("recipes")) for suffix in (".yaml", ".yml")
        ]
    for candidate in candidates:
        if os.path.isfile(candidate):  # False too for a name that no file can have
            return candidate
    if os.path.isdir(path):
        raise RecipeError(Problem("this is a directory; name a recipe file", str(path)))
    folders = (path.parent, Path("recipes"))
    near = nearest(str(path), sorted(str(other) for folder in folders for other in folder.glob("*.y*ml")))
    hint = f'; did you mean "{near}"?' if near else ""
    raise RecipeError(Problem(f"there is no such recipe file{hint}", str(path)))
