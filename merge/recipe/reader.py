"""Reads the nodes of one recipe with the schema's reader, by the recipe's levels and methods.

Keys that mergekit ignores are problems; with `compat: mergekit` they are notes.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

import yaml

from merge.methods.registry import Method
from merge.recipe import names
from merge.recipe.keys import KEYS, LEVELS, REFUSED
from merge.recipe.model import ModelRef
from merge.recipe.references import StageNames
from merge.schema.document import line_of, place
from merge.schema.names import one_of
from merge.schema.reader import Fields, Reader
from merge.schema.scalars import NULL

UNREADABLE = ModelRef("", "")  # stands for an invalid reference, so that the number of models is still right


class RecipeReader(Reader):
    """State of one parse. `lines`: key path -> line, as in Recipe.lines."""

    def __init__(
        self,
        file: str | None,
        methods: dict[str, Method],
        stages: StageNames | None = None,
        compat: str | None = None,
    ) -> None:
        super().__init__(file)
        self.folder = None if file is None else Path(file).parent
        self.methods = methods
        self.stages = stages or StageNames()
        self.method: Method | None = None  # of the part being read: the recipe, a module or a slice
        self.in_use: tuple[Method, ...] = ()  # methods that parameters written here may belong to
        self.compat = compat
        self._ignored: dict[str, list[int]] = {}  # keys that mergekit ignores -> lines

    def ignored(self, at: yaml.Node, key: str, message: str, broken: str | None = None) -> None:
        """An unknown key that mergekit ignores: a problem, or a note with `compat: mergekit`."""
        self._ignored.setdefault(key, []).append(line_of(at))
        if self.compat is None:
            self.problem(at, message, broken)

    def notes(self) -> tuple[str, ...]:
        """The keys that `compat: mergekit` ignored."""
        return (f"compat: mergekit: ignored {self._ignored_keys()}",) if self.compat and self._ignored else ()

    def _ignored_keys(self) -> str:
        """`"weight" (lines 4 and 6), "normalize" (line 9)`"""
        listed = []
        for key, lines in sorted(self._ignored.items(), key=lambda item: min(item[1])):
            numbers = [str(line) for line in sorted(dict.fromkeys(lines))]
            listed.append(f'"{key}" ({"line" if len(numbers) == 1 else "lines"} {one_of(numbers, "and")})')
        return ", ".join(listed)

    def advice(self) -> list[str]:
        does = '"compat: mergekit" in the recipe, or --compat mergekit, does so too and notes it'
        said = f"{place(self.file, None) or 'the recipe'}: mergekit ignores {self._ignored_keys()}; {does}"
        return [said] if self._ignored and self.compat is None else []

    @contextlib.contextmanager
    def scope(self, *methods: Method | None) -> Iterator[None]:
        """Reads a part of the recipe to which these methods apply, its own first."""
        before = self.method, self.in_use
        self.method = methods[0]
        self.in_use = tuple(dict.fromkeys(method for method in methods if method is not None))
        try:
            yield
        finally:
            self.method, self.in_use = before

    def mapping(self, node: yaml.Node, path: str, level: str) -> Fields:
        """The known keys of a mapping, without those that are null; unknown keys are problems."""

        def unknown(key: str, key_node: yaml.Node, value: yaml.Node) -> None:
            if key not in REFUSED.get(level, {}):
                self._unknown(key_node, key, level)
            elif value.tag != NULL:
                self.ignored(key_node, key, REFUSED[level][key])

        return self.fields(node, path, KEYS[level], LEVELS[level], unknown)

    def _unknown(self, node: yaml.Node, key: str, level: str) -> None:
        message = names.unknown_key(key, level, self.method)
        parameters = self.method.parameters if self.method and "parameters" in KEYS[level] else ()
        known = (*KEYS[level], *(parameter.name for parameter in parameters))
        if names.is_ignored_elsewhere(key, known, self.methods):
            self.ignored(node, key, message)
        else:
            self.problem(node, message)

    def reference(self, node: yaml.Node | None, path: str) -> ModelRef | None:
        """A model as written: a string, or {model: ..., lora: ...} where each is a string or {path, revision}."""
        if node is None:
            return None
        if not isinstance(node, yaml.MappingNode):
            text = self.text(node, path)
            return UNREADABLE if text is None else ModelRef(text, text, written="reference", line=line_of(node))
        values = self.mapping(node, path, "reference")
        if "model" not in values:
            self.problem(node, 'a model reference needs the key "model"', path)
        model = self._model_path(*values.at("model"))
        adapter = self._model_path(*values.at("lora"))
        if model is None or UNREADABLE in (model, adapter):
            return UNREADABLE
        text = model.text if adapter is None else f"{model.text}+{adapter.text}"
        override = values.text("override_architecture")
        return ModelRef(text, model.path, model.revision, adapter, override, "path", line_of(node))

    def _model_path(self, node: yaml.Node | None, path: str) -> ModelRef | None:
        if node is None:
            return None
        if not isinstance(node, yaml.MappingNode):
            text = self.text(node, path)
            return UNREADABLE if text is None else ModelRef(text, text, written="path")
        values = self.mapping(node, path, "model path")
        text, revision = values.text("path"), values.text("revision")
        if "path" not in values:
            self.problem(node, 'a model path needs the key "path"', path)
        if text is None:
            return UNREADABLE
        return ModelRef(text if revision is None else f"{text}@{revision}", text, revision, written="path")
