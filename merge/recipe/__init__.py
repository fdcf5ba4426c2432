"""YAML to Recipe: strict, and all problems are reported together, with file and line.

`load_recipe("ties.yaml")`.

document.py    text -> one tree of nodes with lines; size, depth, aliases, tags
reader.py      reads nodes, collects problems
names.py       the keys of each level, and the nearest valid name
references.py  directory, org/name@revision, model+adapter, the name of an earlier document
pipeline.py    several documents, of which later ones use earlier ones: load_pipeline
settings.py    scalars, gradients, conditions, held against the method's signature
build.py       one function a level of the schema
mixture.py     recipes with "experts": another schema
check.py       what needs more than one place: models, base, required parameters
model.py       the dataclasses, and settings -> one number
"""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path

import yaml

from merge.errors import Problem, RecipeError
from merge.methods.registry import all_methods
from merge.recipe.build import build, written_compat
from merge.recipe.check import check
from merge.recipe.document import read_document, read_text
from merge.recipe.mixture import build_mixture, is_mixture
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
from merge.recipe.references import StageNames, parse_reference

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
    "made_recipe",
    "parse_recipe",
    "parse_reference",
    "recipe_of",
    "resolve",
]


def load_recipe(path_or_name: str | Path, compat: str | None = None) -> Recipe:
    """Reads a recipe file.

    Args:
        path_or_name: a file; or its name without `.yaml` or `.yml`, there or in `recipes/`.
        compat: "mergekit": keys that mergekit ignores become notes, as with `compat: mergekit` in the recipe.

    Raises:
        RecipeError: with every problem of the recipe, each with file and line.
    """
    path = find_recipe(Path(path_or_name))
    return parse_recipe(read_text(path), str(path), compat)


def parse_recipe(text: str, file: str | None = None, compat: str | None = None) -> Recipe:
    """A recipe's text -> Recipe.

    Args:
        text: YAML.
        file: its path as messages name it; relative model paths are also looked for beside it.
        compat: as for `load_recipe`.

    Raises:
        RecipeError: with every problem of the recipe, in its order.
    """
    return recipe_of(read_document(text, file), text, file, compat=compat)


def made_recipe(text: str) -> Recipe:
    """A recipe that a command makes of its arguments; as `parse_recipe`, but problems name no line of it."""
    try:
        return parse_recipe(text)
    except RecipeError as error:
        raise RecipeError([dataclasses.replace(problem, where=None) for problem in error.problems]) from None


def recipe_of(
    root: yaml.MappingNode,
    text: str,
    file: str | None,
    stages: StageNames | None = None,
    compat: str | None = None,
    opens: bool = True,
) -> Recipe:
    """A document's tree -> Recipe.

    Args:
        stages: what the other documents of its file are called.
        opens: where something is wrong, look also at the models that are on the disk, so that all is told at once.
    """
    reader = Reader(file, all_methods(), stages, compat or written_compat(root))
    if is_mixture(root):
        recipe = build_mixture(reader, root, text)
    else:
        recipe = build(reader, root, text)
        check(reader, recipe)
    if opens and reader.is_wrong:
        from merge.planners.models import problems_of_models

        reader.add(problems_of_models(recipe))
    reader.raise_if_any()
    return recipe


def find_recipe(path: Path) -> Path:
    """The file of a recipe, or of its name; raises RecipeError if there is none."""
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
