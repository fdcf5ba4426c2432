"""architecture_of: the facts about a model's class, from the table, transformers, or its tensors' names."""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from merge.architecture.facts import Architecture, PerLayer, Rename, Tie
from merge.architecture.names import is_embedding, is_head

TABLE = Path(__file__).with_name("table.json")
_TEXT_SECTIONS = ("text_config", "llm_config", "language_config")


def architecture_of(config: Mapping[str, Any], names: Iterable[str] = ()) -> Architecture:
    """What is known of a model's class.

    Args:
        config: its config.json.
        names: of its tensors, by which a class that transformers does not know is judged.
    """
    name = class_of(config)
    if name is not None and name in _table()["classes"]:
        return from_table(name)
    if name is not None and _transformers_has(name) and (asked := _asked(name, json.dumps(config))) is not None:
        return asked
    return _by_names(name or "", config, names)


def class_of(config: Mapping[str, Any]) -> str | None:
    """The class that a config names; else the one that transformers loads a language model of its type as."""
    listed = config.get("architectures")
    if isinstance(listed, list) and listed and isinstance(listed[0], str):
        return listed[0]
    kind = config.get("model_type")
    return _table()["model_types"].get(kind) if isinstance(kind, str) else None


@functools.cache
def _table() -> dict[str, Any]:
    found: dict[str, Any] = json.loads(TABLE.read_text(encoding="utf-8"))
    return found


@functools.cache
def from_table(name: str) -> Architecture:
    """The table's entry for a class."""
    table = _table()
    said: dict[str, Any] = dict(table["kinds"][table["classes"][name]])
    said["ties"] = [Tie(*tie) for tie in said.get("ties", ())]
    renames = [table["renames"][number] for number in (*said.get("renames", ()), *table["legacy"])]
    said["renames"] = [Rename(*each[:2], *(tuple(scopes) for scopes in each[2:])) for each in renames]
    said["per_layer"] = [PerLayer(*each) for each in said.get("per_layer", ())]
    lists: dict[str, Any] = {key: tuple(value) if isinstance(value, list) else value for key, value in said.items()}
    return Architecture(name, **lists)


def table_text(architectures: Sequence[Architecture], model_types: Mapping[str, str], version: str) -> str:
    """Text of table.json: classes that say the same share an entry, and all share the last renames (`legacy`)."""
    legacy = architectures[0].renames
    for each in architectures:
        while legacy and each.renames[-len(legacy) :] != legacy:
            legacy = legacy[1:]
    renames: dict[Rename, int] = {}
    kinds: dict[str, int] = {}
    classes: dict[str, int] = {}
    for each in architectures:
        own = each.renames[: len(each.renames) - len(legacy)]
        said = {
            **{
                key: value
                for key, value in dataclasses.asdict(each).items()
                if value and key not in ("name", "renames")
            },
            **({"ties": [list(dataclasses.astuple(tie)) for tie in each.ties]} if each.ties else {}),
            **({"per_layer": [list(dataclasses.astuple(part)) for part in each.per_layer]} if each.per_layer else {}),
            **({"renames": [renames.setdefault(rename, len(renames)) for rename in own]} if own else {}),
        }
        classes[each.name] = kinds.setdefault(json.dumps(said), len(kinds))
    last = [renames.setdefault(rename, len(renames)) for rename in legacy]
    patterns = [[r.pattern, r.replacement, *([list(r.scopes)] if r.scopes != ("",) else [])] for r in renames]
    return (
        f'{{"transformers": {json.dumps(version)},\n"model_types": {json.dumps(dict(sorted(model_types.items())))},\n'
        f'"classes": {json.dumps(dict(sorted(classes.items())))},\n"legacy": {json.dumps(last)},\n'
        f'"renames": {json.dumps(patterns)},\n"kinds": [\n' + ",\n".join(kinds) + "\n]}\n"
    )


def _transformers_has(name: str) -> bool:
    """Whether the installed transformers names the class in its lists; it is not imported for that."""
    spec = importlib.util.find_spec("transformers")
    if spec is None or not spec.submodule_search_locations:
        return False
    lists = Path(spec.submodule_search_locations[0], "models", "auto", "modeling_auto.py")
    return lists.is_file() and f'"{name}"' in lists.read_text(encoding="utf-8")


@functools.cache
def _asked(name: str, config: str) -> Architecture | None:
    from merge.architecture.ask import ask

    try:
        return ask(name, json.loads(config))
    except Exception:  # it cannot be built from this config, for one of a hundred reasons; names will do
        return None


def _by_names(name: str, config: Mapping[str, Any], names: Iterable[str]) -> Architecture:
    """A head and an embedding, tied where the config says so: at its top, else in its text part."""
    listed = list(names)
    embedding = next((each for each in listed if is_embedding(each)), None)
    head = next((each for each in listed if is_head(each)), "lm_head.weight")
    section = next((key for key in _TEXT_SECTIONS if isinstance(config.get(key), dict)), "")
    ties = () if embedding is None else (Tie(head, embedding, section, "001000111"),)
    return Architecture(name, embedding=embedding, head=head, ties=ties)
