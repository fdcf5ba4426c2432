"""Reads YAML and flags into a Config. Strict: reports all problems together, with file and line or the flag.

A flag becomes a node too, so YAML and flags are read by the same code (merge/schema).
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from finetune.before import CONFIG
from finetune.foreign import ours
from finetune.keys import KEYS, PROMPTS, SOURCE_KEYS, Config, DataSource
from merge.codec import decode
from merge.schema.document import compose_value, read_document, read_text
from merge.schema.keys import Key
from merge.schema.names import one_of, suggest
from merge.schema.reader import Fields, Reader, join
from merge.schema.scalars import SEQ, STR, as_number

_SHARE = Key("float", above=0, high=0.9)


class ConfigReader(Reader):
    """Also reads data sources, and knows other tools' names of our keys."""

    def value(self, node: yaml.Node, path: str, key: Key) -> object:
        if key.kind == "fraction|data" and _is_number(node):
            return self.number(node, path, _SHARE)
        return self._sources(node, path) if key.kind in ("data", "fraction|data") else super().value(node, path, key)

    def known(self, node: yaml.Node, path: str, keys: Mapping[str, Key], what: str) -> Fields:
        """The keys of a config or of a source."""

        def unknown(key: str, key_node: yaml.Node, value: yaml.Node) -> None:
            self.problem(key_node, f'unknown key "{key}"; {ours(key) or suggest(key, keys)}')

        return self.fields(node, path, keys, what, unknown)

    def _sources(self, node: yaml.Node, path: str) -> tuple[DataSource, ...] | None:
        items = self.items(node, path) if isinstance(node, yaml.SequenceNode) else [node]
        if not items:
            self.problem(node, f'"{path}" is empty; name at least one file', path)
        found = [self._source(item, path, join(path, str(i))) for i, item in enumerate(items)]
        sources = tuple(source for source in found if source is not None)
        return sources if sources and len(sources) == len(found) else None

    def _source(self, node: yaml.Node, data: str, path: str) -> DataSource | None:
        if not isinstance(node, yaml.MappingNode):
            text = self.text(node, path)
            return None if text is None else DataSource(text)
        fields = self.known(node, path, SOURCE_KEYS, f'an entry of "{data}"')
        values = {name: fields.value(name) for name in fields}
        if "path" not in values:
            self.problem(node, f'an entry of "{data}" needs the key "path": the file, or a hub id')
        return None if "path" not in values or None in values.values() else DataSource(**values)


def _is_number(node: yaml.Node) -> bool:
    return isinstance(node, yaml.ScalarNode) and as_number(node) is not None


def load_config(
    file: str | None, flags: Mapping[str, Sequence[str]] | None = None, defaults: Mapping[str, object] | None = None
) -> Config:
    """Reads a config file (or none), then the flags over it.

    Args:
        flags: key -> the strings given on the command line, one unless the key is a list.
        defaults: values from an adapter's record, which file and flags override.

    Raises:
        RecipeError: all problems, in order.
    """
    place = ConfigReader(file)
    root = None
    if file is not None:
        root = read_document(read_text(Path(file), CONFIG), file, CONFIG)
    config = read_config(place, root, flags, defaults)
    place.raise_if_any()
    return config


def read_config(
    place: ConfigReader,
    root: yaml.Node | None,
    flags: Mapping[str, Sequence[str]] | None = None,
    defaults: Mapping[str, object] | None = None,
) -> Config:
    """Like load_config, from a node; `place` collects the problems."""
    values: dict[str, Any] = {}
    if root is not None:
        fields = place.known(root, "", KEYS, "the config")
        values = {name: fields.value(name) for name in fields}
    for name, texts in (flags or {}).items():
        with place.at_flag(_flag(name)):
            values[name] = place.value(flag_node(texts, name, KEYS[name]), name, KEYS[name])
    good = {name: value for name, value in values.items() if value is not None}
    config = Config(**{**(defaults or {}), **good})
    problem = _Complaints(place, values, flags or {})
    if config.adapter and defaults and config.train != defaults.get("train", config.train):
        problem("train", f'the adapter being continued has train: {defaults["train"]}; remove "train"')
    _check_together(problem, config)
    return config


def to_json(config: Config) -> str:
    """The config as JSON; equal configs give equal text."""
    return json.dumps(dataclasses.asdict(config), sort_keys=True)


def from_record(values: object) -> Config:
    """dataclasses.asdict of a Config, read from JSON -> Config. Raises ValueError for anything else."""
    return decode(values, Config)


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def flag_node(texts: Sequence[str], name: str, key: Key) -> yaml.Node:
    """A flag's strings as a YAML node, so that flags and files have the same rules."""
    if key.kind in ("str", "data", "fraction|data"):
        if name in ("prompt", "completion", "text"):  # a shell does not write line breaks easily
            texts = [text.replace("\\n", "\n").replace("\\t", "\t") for text in texts]
        nodes: list[yaml.Node] = [yaml.ScalarNode(STR, text, *_MARKS) for text in texts]
    elif key.kind == "words":
        nodes = [yaml.ScalarNode(STR, word, *_MARKS) for text in texts for word in text.split(",") if word]
    else:
        nodes = [compose_value(text) or yaml.ScalarNode(STR, text, *_MARKS) for text in texts]
    single = len(nodes) == 1 and key.kind not in ("words", "data")
    return nodes[0] if single else yaml.SequenceNode(SEQ, nodes, *_MARKS)


_MARK = yaml.Mark("", 0, 0, 0, None, 0)
_MARKS = (_MARK, _MARK)


class _Complaints:
    """Reports a problem where its key was given: at the flag, the line, or the file."""

    def __init__(self, place: ConfigReader, values: Mapping[str, object], flags: Mapping[str, object]) -> None:
        self._place, self._flags = place, flags
        self.given = [name for name, value in values.items() if value is not None]
        self.wrong = [name for name, value in values.items() if value is None]

    def __call__(self, name: str, message: str) -> None:
        if name in self.wrong:  # reported already
            return
        flag = _flag(name) if name in self._flags else "config" if self._place.file is None else None
        with self._place.at_flag(flag):
            self._place.problem(self._place.line(name), message)


def _check_together(problem: _Complaints, config: Config) -> None:
    """Checks that involve several keys."""
    for name, what in (("model", "what to train"), ("data", "what to train on"), ("out", "the directory to make")):
        if not getattr(config, name) and not (name == "model" and config.adapter):
            problem(name, f'"{name}" is missing: {what}')
    for name in problem.given:
        only = KEYS[name].only
        if config.adapter and KEYS[name].group == "Adapters":
            problem(name, f'"{name}" comes from the adapter being continued; remove it')
        elif only and config.train not in only and "train" not in problem.wrong:
            problem(name, f'"{name}" belongs to train: {one_of(only)}; this is train: {config.train}')
        wanted = KEYS[name].objectives
        if wanted and config.objective and config.objective not in wanted and "objective" not in problem.wrong:
            problem(name, f'"{name}" belongs to objective: {one_of(wanted)}; this is objective: {config.objective}')
    if "rope_factor" in problem.given and config.rope_scaling is None and "rope_scaling" not in problem.wrong:
        problem("rope_factor", '"rope_factor" needs rope_scaling: linear, dynamic or yarn')
    if config.rope_scaling and config.train not in ("full", "partial", "bitfit"):
        message = "changes config.json, which an adapter does not have; use train: full, partial or bitfit"
        problem("rope_scaling", f'"rope_scaling" {message}')
    levels: list[Config | DataSource] = [config, *config.data]
    for level in levels:
        if (level.prompt is None) != (level.completion is None):
            missing = "completion" if level.completion is None else "prompt"
            problem(
                "data" if isinstance(level, DataSource) else missing, f'templates come in pairs: "{missing}" is missing'
            )
    weights = [source.weight for source in config.data]
    if None in weights and any(weight is not None for weight in weights):
        problem("data", 'give every entry of "data" a weight, or none')
    if config.train == "partial" and not any(
        (config.freeze_first, config.train_last, config.freeze, config.train_only)
    ):
        problem("train", "train: partial needs one of freeze_first, train_last, freeze or train_only")
    if config.validation is None:
        for name in ("early_stopping", "eval_every", "keep_best"):
            if getattr(config, name):
                problem(name, f'"{name}" needs "validation": a share of the data such as 0.05, or a file')
    if keeps_best(config) and config.save_every and config.eval_every and config.save_every % config.eval_every:
        message = f"must be a multiple of eval_every ({config.eval_every}), so that the best checkpoint is kept"
        problem("save_every", f'"save_every" {message}')
    if config.train in PROMPTS and config.packing:
        problem("packing", f"train: {config.train} puts its tokens before a row, so rows cannot be packed")
    if config.train == "prefix" and config.gradient_checkpointing:
        problem("gradient_checkpointing", "prefix tuning feeds keys and values, which checkpointing cannot recompute")
    if config.adapter and config.new_tokens:
        problem("new_tokens", "an adapter being continued keeps its vocabulary: new_tokens cannot be added")


def keeps_best(config: Config) -> bool:
    return config.validation is not None and config.keep_best is not False
