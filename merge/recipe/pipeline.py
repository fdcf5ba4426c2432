"""Recipes of several documents: `load_pipeline("pipeline.yaml")`. Later documents use earlier ones by name.

The schema is mergekit-multi's: documents separated by `---`, each a recipe with a `name`; the last one may lack it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import yaml

from merge.errors import Problem
from merge.recipe.model import Recipe
from merge.recipe.references import StageNames
from merge.schema.document import Document, line_of, place


@dataclass(frozen=True, slots=True)
class Stage:
    """One document.

    Attributes:
        name: for use by later documents; None only for the last.
        recipe: its `text` has all documents that are needed to make this one.
        uses: names of the earlier stages that it reads, in the pipeline's order.
        line: where it begins in the file.
    """

    name: str | None
    recipe: Recipe
    uses: tuple[str, ...]
    line: int


@dataclass(frozen=True, slots=True)
class Pipeline:
    """Stages in order; the last one is the result. A recipe of one document is a pipeline of one stage."""

    stages: tuple[Stage, ...]
    notes: tuple[str, ...]
    text: str
    file: str | None = None

    def is_used(self, stage: Stage) -> bool:
        return any(stage.name in other.uses for other in self.stages)


def stage_names(documents: Sequence[Document]) -> Iterator[StageNames]:
    """For each document, the names of the others. The name of a single document may also be a model's."""
    if len(documents) == 1:
        yield StageNames()
        return
    names = [name_of(document) for document in documents]
    circles = _circles(documents, names)
    for number in range(len(documents)):
        earlier = tuple(dict.fromkeys(name for name in names[:number] if name is not None))
        later = {
            name: documents[place].line
            for place, name in enumerate(names)
            if place > number and name is not None and name not in (*earlier, names[number])
        }
        yield StageNames(earlier, later, frozenset(circles[number]), names[number])


def name_of(document: Document) -> str | None:
    """The document's name, if it has one, not yet checked."""
    return next((value.value for key, value in document.root.value if _is_name(key, value)), None)


def _is_name(key: yaml.Node, value: yaml.Node) -> bool:
    return key.value == "name" and isinstance(value, yaml.ScalarNode) and bool(value.value)


def name_problems(documents: Sequence[Document], names: Sequence[str | None], file: str | None) -> Iterator[Problem]:
    first: dict[str, int] = {}
    for document, name in zip(documents, names, strict=True):
        if name is None:
            if document is not documents[-1]:
                message = 'this document needs a "name", by which later documents use it; only the last one needs none'
                yield Problem(message, place(file, document.line))
            continue
        line = next(line_of(key) for key, value in document.root.value if _is_name(key, value))
        if name in first:
            yield Problem(
                f'two documents have the name "{name}"; the first is on line {first[name]}', place(file, line)
            )
        first.setdefault(name, line)


def _circles(documents: Sequence[Document], names: Sequence[str | None]) -> list[list[str]]:
    """For each document, the names of those that use it and that it uses, directly or through others."""
    known = frozenset(name for name in names if name is not None)
    uses = [known.intersection(_texts(document.root)) for document in documents]
    by_name: Mapping[str, frozenset[str]] = {name: uses[i] for i, name in enumerate(names) if name is not None}
    reach = [_reach(used, by_name) for used in uses]
    return [
        [name for name in reach[i] if own is not None and own in _reach(by_name[name], by_name)]
        for i, own in enumerate(names)
    ]


def _reach(start: frozenset[str], uses: Mapping[str, frozenset[str]]) -> dict[str, None]:
    found: dict[str, None] = {}
    todo = sorted(start)
    while todo:
        name = todo.pop()
        if name not in found:
            found[name] = None
            todo += sorted(uses[name])
    return found


_MODEL_KEYS = ("model", "base_model", "path")


def _texts(root: yaml.Node) -> list[str]:
    """The values of all keys that name a model, each node once: many aliases may lead to it."""
    found: list[str] = []
    todo, seen = [root], set()
    while todo:
        node = todo.pop()
        if id(node) in seen:
            continue
        seen.add(id(node))
        if isinstance(node, yaml.SequenceNode):
            todo += node.value
        elif isinstance(node, yaml.MappingNode):
            for key, value in node.value:
                if isinstance(value, yaml.ScalarNode) and key.value in _MODEL_KEYS:
                    found += [value.value, value.value.rpartition("+")[0]]
                todo.append(value)
    return found


def with_texts(stages: Sequence[Stage], text: str) -> Iterator[Stage]:
    """Each recipe with the text of all documents that it needs, so that the copy beside the result can be run again."""
    needs: dict[str, dict[str, None]] = {}  # name -> the stages that it needs, including itself
    texts = {stage.name: stage.recipe.text for stage in stages}
    for stage in stages:
        taken = dict.fromkeys(name for used in stage.uses for name in needs[used])
        ordered = [each.name for each in stages if each.name in taken and each.name is not None]
        if stage.name is not None:
            needs[stage.name] = dict.fromkeys([*ordered, stage.name])
        parts = [texts[name].rstrip("\n") + "\n" for name in ordered] + [stage.recipe.text]
        whole = text if stage is stages[-1] else "---\n".join(parts)
        yield replace(stage, recipe=replace(stage.recipe, text=whole))
