"""Scalar nodes of a YAML tree -> numbers and booleans; descriptions of nodes for messages."""

from __future__ import annotations

import math

import yaml

_TAG = "tag:yaml.org,2002:"
NULL, STR, MAP, SEQ = f"{_TAG}null", f"{_TAG}str", f"{_TAG}map", f"{_TAG}seq"
_INT = f"{_TAG}int"
_BOOLEANS = {"true": True, "false": False, "yes": True, "no": False, "on": True, "off": False}
MAX_DIGITS = 400  # a number with the parts of 1:1:1... (base 60) takes quadratic time


def as_integer(node: yaml.Node) -> int | None:
    if not isinstance(node, yaml.ScalarNode) or node.tag != _INT or len(node.value) > MAX_DIGITS:
        return None
    try:
        return int(yaml.constructor.SafeConstructor().construct_yaml_int(node))
    except (ValueError, IndexError):  # !!int with another value
        return None


def as_number(node: yaml.ScalarNode) -> float | None:
    """A number as float, including strings that YAML 1.1 does not read as numbers, such as 1e-3 and "0.5"."""
    kind = node.tag.rpartition(":")[2]
    if len(node.value) > MAX_DIGITS:
        return math.inf if kind in ("int", "float") else None
    try:
        if kind == "str":
            return float(node.value)
        if kind == "int":
            whole = as_integer(node)
            return None if whole is None else float(whole)
        return float(yaml.constructor.SafeConstructor().construct_yaml_float(node)) if kind == "float" else None
    except OverflowError:
        return math.inf
    except (ValueError, IndexError):  # not a number; !!float with another value
        return None


def as_boolean(node: yaml.ScalarNode) -> bool | None:
    """true, false and their YAML 1.1 spellings, quoted or not; 1 and 0."""
    number = as_number(node)
    if number is not None:
        return bool(number) if number in (0, 1) else None
    return _BOOLEANS.get(node.value.lower())


def shown(node: yaml.Node) -> str:
    """A node's description in messages, on one short line."""
    if isinstance(node, yaml.MappingNode):
        return "a mapping"
    if isinstance(node, yaml.SequenceNode):
        return "a list" if node.value else "an empty list"
    if node.tag == NULL:
        return "nothing"
    text = node.value if len(node.value) <= 40 else node.value[:37] + "..."
    text = text.replace("\n", " ")
    return f'"{text}"' if node.tag == STR or not text else text
