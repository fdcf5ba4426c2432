"""Reads recipe files: `load_recipe("ties.yaml")`, `load_pipeline("pipeline.yaml")`."""

from __future__ import annotations

import os
from pathlib import Path

from merge.errors import Problem, RecipeError
from merge.planning.resolve import resolve
from merge.recipe.build import draft_of
from merge.recipe.model import Recipe
from merge.recipe.names import RECIPE
from merge.recipe.pipeline import Pipeline, Stage, name_of, name_problems, stage_names, with_texts
from merge.schema.document import read_document, read_documents, read_text
from merge.schema.names import nearest
from merge.schema.reader import MAX_PROBLEMS


def load_recipe(path_or_name: str | Path, compat: str | None = None) -> Recipe:
    """Reads a recipe file.

    Args:
        path_or_name: a file; or its name without `.yaml` or `.yml`, there or in `recipes/`.
        compat: "mergekit": keys that mergekit ignores become notes, as with `compat: mergekit` in the recipe.

    Raises:
        RecipeError: with every problem of the recipe, each with file and line.
    """
    path = find_recipe(Path(path_or_name))
    return parse_recipe(read_text(path, RECIPE), str(path), compat)


def parse_recipe(text: str, file: str | None = None, compat: str | None = None) -> Recipe:
    """A recipe's text -> Recipe.

    Args:
        text: YAML.
        file: its path as messages name it; relative model paths are also looked for beside it.
        compat: as for `load_recipe`.

    Raises:
        RecipeError: with every problem of the recipe, in its order.
    """
    return resolve(draft_of(read_document(text, file, RECIPE), text, file, compat=compat))


def load_pipeline(path_or_name: str | Path, compat: str | None = None) -> Pipeline:
    """Reads a file of one recipe or several; as `load_recipe`.

    Raises:
        RecipeError: with every problem of all documents, each with file and line.
    """
    path = find_recipe(Path(path_or_name))
    return parse_pipeline(read_text(path, RECIPE), str(path), compat)


def parse_pipeline(text: str, file: str | None = None, compat: str | None = None) -> Pipeline:
    """A text of one document or several -> Pipeline; arguments and errors as for `parse_recipe`."""
    documents = read_documents(text, file, RECIPE)
    names = [name_of(document) for document in documents]
    problems = list(name_problems(documents, names, file))
    advice: list[str] = []
    stages: list[Stage] = []
    notes: dict[str, None] = {}
    for document, seen in zip(documents, stage_names(documents), strict=True):
        try:
            recipe = resolve(draft_of(document.root, document.text, file, seen, compat))
        except RecipeError as error:
            problems += error.problems
            advice += error.advice
            if len(problems) > MAX_PROBLEMS:
                break
            continue
        for name in seen.shadowed:
            notes[f'"{name}" is the document of that name, not the directory; that would be "./{name}"'] = None
        uses = tuple(name for name in seen.earlier if name in seen.used)
        stages.append(Stage(recipe.name, recipe, uses, document.line))
    if problems:
        raise RecipeError(problems, advice)
    return Pipeline(tuple(with_texts(stages, text)), tuple(notes), text, file)


def find_recipe(path: Path) -> Path:
    """The file of a recipe, or of its name; raises RecipeError if there is none."""
    candidates = [path]
    if path.suffix not in (".yaml", ".yml"):
        candidates += [
            folder / f"{path}{suffix}" for folder in (Path(), Path("recipes")) for suffix in (".yaml", ".yml")
        ]
    for candidate in candidates:
        if os.path.isfile(candidate):  # also False for an impossible file name
            return candidate
    if os.path.isdir(path):
        raise RecipeError(Problem("this is a directory; name a recipe file", str(path)))
    folders = (path.parent, Path("recipes"))
    near = nearest(str(path), sorted(str(other) for folder in folders for other in folder.glob("*.y*ml")))
    hint = f'; did you mean "{near}"?' if near else ""
    raise RecipeError(Problem(f"there is no such recipe file{hint}", str(path)))
