"""YAML to Recipe: strict, and all problems are reported together, with file and line.

`load_recipe("ties.yaml")`. A text becomes a Draft by itself; merge/planners/resolve.py makes a Recipe of that, once.

document.py    text -> one tree of nodes with lines; size, depth, aliases, tags
reader.py      reads nodes, collects problems
names.py       the keys of each level, and the nearest valid name
references.py  directory, org/name@revision, model+adapter, the name of an earlier document; looks at the disk
mentioned.py   every model that a recipe names
pipeline.py    several documents, of which later ones use earlier ones: load_pipeline
settings.py    scalars, gradients, conditions, held against the method's signature
draft.py       what a text says by itself
build.py       one function a level of the schema
mixture.py     recipes with "experts": another schema
check.py       what needs more than one place: models, base, required parameters
text.py        a recipe made of values -> its text
model.py       the dataclasses, and settings -> one number
"""

from __future__ import annotations

import os
from pathlib import Path

from merge.errors import Problem, RecipeError
from merge.recipe.document import read_document, read_text
from merge.recipe.draft import Draft, draft_of
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
from merge.recipe.references import parse_reference

__all__ = [
    "ALLOW",
    "Conditional",
    "Draft",
    "ModelRef",
    "Module",
    "Recipe",
    "Scalar",
    "Setting",
    "Settings",
    "Slice",
    "Source",
    "draft_of",
    "evaluate",
    "load_recipe",
    "parse_recipe",
    "parse_reference",
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
    from merge.planners.resolve import resolve

    return resolve(draft_of(read_document(text, file), text, file, compat=compat))


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
