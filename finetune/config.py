"""Reads YAML and flags into a Config. Strict: reports all problems together, with file and line or the flag.

The YAML is read with the pieces that read recipes (merge/recipe/document.py, reader.py); a flag is a node of its own.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from finetune.foreign import ours
from finetune.keys import KEYS, SOURCE_KEYS, Config, Key, Source
from merge.errors import Problem
from merge.recipe.document import Kind, compose_value, read_document, read_text
from merge.recipe.names import suggest
from merge.recipe.reader import MAX_DIGITS, Reader, as_integer, one_of, shown

KIND = Kind("config", "model: org/base", "model and data")
_TAG = "tag:yaml.org,2002:"
_NULL, _STR = f"{_TAG}null", f"{_TAG}str"
WRONG = object()  # a value with a problem; the default stands in until all problems are raised


class ConfigReader(Reader):
    """A recipe reader whose problems may stand at a flag instead of a line."""

    def __init__(self, file: str | None) -> None:
        super().__init__(file, {})
        self.flag: str | None = None

    def problem(self, at: yaml.Node | int, message: str, broken: str | None = None) -> None:
        if self.flag is None:
            super().problem(at, message, broken)
        else:
            self._problems.append((0, Problem(message, self.flag)))


def load_config(
    file: str | None, flags: Mapping[str, Sequence[str]] | None = None, defaults: Mapping[str, Any] | None = None
) -> Config:
    """Reads a config file (or none), then the flags over it.

    Args:
        flags: key -> the texts given on the command line; a key that holds no list has one.
        defaults: values that file and flags stand over: those of an adapter's record.

    Raises:
        RecipeError: everything that is wrong, in order.
    """
    place = ConfigReader(file)
    root = None
    if file is not None:
        root = read_document(read_text(Path(file), KIND), file, KIND)
    config = read_config(place, root, flags, defaults)
    place.raise_if_any()
    return config


def read_config(
    place: ConfigReader,
    root: yaml.Node | None,
    flags: Mapping[str, Sequence[str]] | None = None,
    defaults: Mapping[str, Any] | None = None,
) -> Config:
    """As load_config, from a node; what is wrong goes to `place`."""
    values: dict[str, Any] = {}
    if root is not None:
        for name, node in _known(place, root, "", KEYS, "the config"):
            values[name] = read_value(place, node, name, KEYS[name])
    for name, texts in (flags or {}).items():
        place.flag = f"--{name.replace('_', '-')}"
        values[name] = _flag(place, texts, name, KEYS[name])
    place.flag = None
    good = {name: value for name, value in values.items() if value is not WRONG}
    config = Config(**{**(defaults or {}), **good})
    problem = _Complaints(place, values, flags or {})
    if config.adapter and defaults and config.train != defaults.get("train", config.train):
        problem("train", f'the adapter being continued has train: {defaults["train"]}; remove "train"')
    _check_together(problem, config)
    return config


def to_json(config: Config) -> str:
    """The config as it decides the result; equal configs give equal text."""
    return json.dumps(dataclasses.asdict(config), sort_keys=True)


def from_record(values: Mapping[str, Any]) -> dict[str, Any]:
    """What a record keeps (dataclasses.asdict of a Config) -> keyword arguments for Config again."""
    read: dict[str, Any] = {}
    for name, value in values.items():
        if name not in KEYS or value is None:
            continue
        if isinstance(value, list):
            value = tuple(_source(item) if isinstance(item, dict) else item for item in value)
        read[name] = value
    return read


def _source(item: Mapping[str, Any]) -> Source:
    values: dict[str, Any] = {name: tuple(one) if isinstance(one, list) else one for name, one in item.items()}
    return Source(**values)


def _known(
    place: ConfigReader, node: yaml.Node, path: str, keys: Mapping[str, Key], what: str
) -> list[tuple[str, yaml.Node]]:
    found = []
    for name, key_node, value in place.pairs(node, path, what):
        if name not in keys:
            place.problem(key_node, f'unknown key "{name}"; {ours(name) or suggest(name, list(keys))}')
        elif value.tag != _NULL:
            found.append((name, value))
    return found


def _flag(place: ConfigReader, texts: Sequence[str], name: str, key: Key) -> Any:
    """A flag's texts are read as YAML reads them, so that both ways have the same rules."""
    if key.kind in ("str", "data", "fraction|data"):
        if name in ("prompt", "completion", "text"):  # a shell does not write line breaks easily
            texts = [text.replace("\\n", "\n").replace("\\t", "\t") for text in texts]
        nodes: list[yaml.Node] = [yaml.ScalarNode(_STR, text, *_MARKS) for text in texts]
        if key.kind == "fraction|data" and len(texts) == 1 and _number(_plain(texts[0])) is not None:
            nodes = [_plain(texts[0])]
    elif key.kind == "words":
        nodes = [yaml.ScalarNode(_STR, word, *_MARKS) for text in texts for word in text.split(",") if word]
    else:
        nodes = [_plain(text) for text in texts]
    single = len(nodes) == 1 and key.kind not in ("words", "data")
    return read_value(place, nodes[0] if single else yaml.SequenceNode(f"{_TAG}seq", nodes, *_MARKS), name, key)


_MARK = yaml.Mark("", 0, 0, 0, None, 0)
_MARKS = (_MARK, _MARK)


def _plain(text: str) -> yaml.Node:
    return compose_value(text) or yaml.ScalarNode(_STR, text, *_MARKS)


def read_value(place: ConfigReader, node: yaml.Node, path: str, key: Key) -> Any:
    kind = key.kind
    if kind == "str":
        text = place.text(node, path)
        if text is None:
            return WRONG
        if key.choices and text not in key.choices:
            place.problem(node, f'"{path}" is "{text}"; {suggest(text, key.choices)}')
            return WRONG
        return text
    if kind == "bool":
        if isinstance(node, yaml.ScalarNode) and node.tag == f"{_TAG}bool":
            return node.value.lower() in ("true", "yes", "on")
        place.problem(node, f'"{path}" must be true or false, not {shown(node)}')
        return WRONG
    if kind in ("int", "float"):
        return _ranged(place, node, path, key)
    if kind == "words":
        items = place.items(node, path, path) if isinstance(node, yaml.SequenceNode) else [node]
        words = [place.text(item, path) for item in items]
        return WRONG if None in words else tuple(words)
    if kind == "table":
        found = {name: _ranged(place, value, f"{path}.{name}", key) for name, _, value in place.pairs(node, path, path)}
        return WRONG if not found or WRONG in found.values() else found
    if kind == "fraction|data" and _number(node) is not None:
        return _ranged(place, node, path, dataclasses.replace(key, kind="float", above=0, high=0.9))
    return _sources(place, node, path)


def _ranged(place: ConfigReader, node: yaml.Node, path: str, key: Key) -> Any:
    value: float | None = as_integer(node) if key.kind == "int" else _number(node)
    good = (
        value is not None
        and math.isfinite(value)
        and (key.low is None or value >= key.low)
        and (key.high is None or value <= key.high)
        and (key.above is None or value > key.above)
    )
    if good:
        return value
    limits = [
        f"{word} {limit:.10g}"
        for word, limit in (("at least", key.low), ("above", key.above), ("at most", key.high))
        if limit is not None
    ]
    span = f" {' and '.join(limits)}" if limits else ""
    whole = "whole number" if key.kind == "int" else "number"
    place.problem(node, f'"{path}" must be a {whole}{span}, not {shown(node)}')
    return WRONG


def _number(node: yaml.Node) -> float | None:
    """YAML 1.1 takes 2e-4 for a text; here it is the number that was meant."""
    if not isinstance(node, yaml.ScalarNode) or node.tag not in (f"{_TAG}int", f"{_TAG}float", _STR):
        return None
    if len(node.value) > MAX_DIGITS:
        return None
    try:
        return float(node.value)
    except ValueError:
        return None


def _sources(place: ConfigReader, node: yaml.Node, path: str) -> Any:
    items = place.items(node, path, path) if isinstance(node, yaml.SequenceNode) else [node]
    if not items:
        place.problem(node, f'"{path}" is empty; name at least one file')
    sources = []
    for i, item in enumerate(items):
        here = f"{path}.{i}"
        if not isinstance(item, yaml.MappingNode):
            text = place.text(item, here)
            sources.append(WRONG if text is None else Source(text))
            continue
        values = {
            name: read_value(place, value, f"{here}.{name}", SOURCE_KEYS[name])
            for name, value in _known(place, item, here, SOURCE_KEYS, f'an entry of "{path}"')
        }
        if "path" not in values:
            place.problem(item, f'an entry of "{path}" needs the key "path": the file, or a hub id')
        if "path" not in values or WRONG in values.values():
            sources.append(WRONG)
        else:
            sources.append(Source(**values))
    return WRONG if not sources or WRONG in sources else tuple(sources)


class _Complaints:
    """Puts a problem with a key where the key was given: at its flag, its line, or the file."""

    def __init__(self, place: ConfigReader, values: Mapping[str, Any], flags: Mapping[str, Any]) -> None:
        self._place, self._flags = place, flags
        self.given = [name for name, value in values.items() if value is not WRONG]
        self.wrong = [name for name, value in values.items() if value is WRONG]

    def __call__(self, name: str, message: str) -> None:
        if name in self.wrong:  # said already
            return
        self._place.flag = f"--{name.replace('_', '-')}" if name in self._flags else None
        if self._place.flag is None and self._place.file is None:
            self._place.flag = "config"
        self._place.problem(self._place.line(name), message)
        self._place.flag = None


def _check_together(problem: _Complaints, config: Config) -> None:
    """What needs more than one key."""
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
    levels: list[Config | Source] = [config, *config.data]
    for level in levels:
        if (level.prompt is None) != (level.completion is None):
            missing = "completion" if level.completion is None else "prompt"
            problem(
                "data" if isinstance(level, Source) else missing, f'templates come in pairs: "{missing}" is missing'
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
    if config.train in ("prompt", "prefix", "ptuning") and config.packing:
        problem("packing", f"train: {config.train} puts its tokens before a row, so rows cannot be packed")
    if config.train == "prefix" and config.gradient_checkpointing:
        problem("gradient_checkpointing", "prefix tuning feeds keys and values, which checkpointing cannot recompute")
    if config.adapter and config.new_tokens:
        problem("new_tokens", "an adapter being continued keeps its vocabulary: new_tokens cannot be added")


def keeps_best(config: Config) -> bool:
    return config.validation is not None and config.keep_best is not False
