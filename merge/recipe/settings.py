"""The values under `parameters`: scalars, gradients, conditions. Checked against the method's signature; resolved."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import yaml

from merge.errors import Problem
from merge.methods.registry import INT8_MASK, OUTPUT_RANK, Parameter
from merge.quoting import some
from merge.recipe import names
from merge.recipe.keys import OPEN_PLACE
from merge.recipe.model import Conditional, Scalar, Setting, Settings
from merge.recipe.reader import RecipeReader
from merge.schema.names import nearest, one_of
from merge.schema.reader import join
from merge.schema.scalars import as_boolean, as_number, shown

Level = Literal["model", "shared"]  # under one model or source; or under a slice, a module or the recipe


def read_settings(reader: RecipeReader, node: yaml.Node | None, path: str, level: Level) -> Settings:
    """`parameters:` of one level. Wrong values are left out, but their lines stay in reader.lines."""
    settings: dict[str, Setting] = {}
    if node is None:
        return settings
    for key, key_node, value in reader.pairs(node, path, '"parameters"'):
        meant_for = [found for method in reader.in_use if (found := method.parameter(key)) is not None]
        meant_for = meant_for or [parameter for parameter in (OUTPUT_RANK, INT8_MASK) if parameter.name == key]
        if reader.in_use and not meant_for:
            _unknown(reader, key_node, key, path)
            continue
        if level == "model" and meant_for and not meant_for[0].per_model:
            reader.ignored(key_node, key, _misplaced(reader, key), join(path, key))
            continue
        # If several methods have a parameter of that name, the value must be valid for each of them.
        each: Sequence[Parameter | None] = meant_for or [None]
        read = [_setting(reader, value, join(path, key), parameter) for parameter in each]
        setting = None if None in read else read[0]
        if setting is None:
            reader.broken.add(join(path, key))
        else:
            settings[key] = setting
    return settings


def _unknown(reader: RecipeReader, node: yaml.Node, key: str, path: str) -> None:
    message = names.unknown_parameter(key, reader.in_use, reader.methods)
    known = [parameter.name for method in reader.in_use for parameter in method.parameters]
    meant = join(path, nearest(key, known) or key)  # a misspelt weight is not missing too
    if names.is_ignored_elsewhere(key, known, reader.methods):
        reader.ignored(node, key, message, meant)
    else:
        reader.problem(node, message, meant)


def _misplaced(reader: RecipeReader, key: str) -> str:
    assert reader.method is not None
    return (
        f'"{key}" is one value for all models of {reader.method.name} and has no effect under a single model; '
        'move it to "parameters" of the recipe or of the slice'
    )


def _setting(reader: RecipeReader, node: yaml.Node, path: str, parameter: Parameter | None) -> Setting | None:
    """A value, a gradient or conditions; None, with a problem noted, if any leaf is wrong."""
    items = node.value if isinstance(node, yaml.SequenceNode) else [node]
    if not any(isinstance(item, yaml.MappingNode) for item in items):
        return _value(reader, node, path, parameter)
    if not all(isinstance(item, yaml.MappingNode) for item in items):
        message = f'"{_key(path)}" must be a list of values or a list of conditions ({{filter, value}}), not a mix'
        reader.problem(node, message)
        return None
    found = [_condition(reader, item, join(path, str(i)), parameter) for i, item in enumerate(items)]
    return None if None in found else tuple(condition for condition in found if condition is not None)


def _key(path: str) -> str:
    """ "models.0.parameters.weight.1.value" -> "weight" """
    return path.rpartition("parameters.")[2].partition(".")[0]


def _condition(reader: RecipeReader, node: yaml.Node, path: str, parameter: Parameter | None) -> Conditional | None:
    if isinstance(node, yaml.MappingNode) and any(key.value in OPEN_PLACE for key, _ in node.value):
        reader.problem(node, f'"{_key(path)}" is open here; write a value, or let `merge search` find one')
        return None
    fields = reader.mapping(node, path, "condition")
    written = fields.get("filter")
    if written is not None and not (isinstance(written, yaml.ScalarNode) and written.tag.endswith(":str")):
        reader.problem(written, f"a filter must be a string, a part of a tensor's name, not {shown(written)}")
        return None
    if "value" not in fields:
        reader.problem(node, f'a condition of "{_key(path)}" needs the key "value"')
        return None
    value = _value(reader, fields["value"], path, parameter)
    return None if value is None else Conditional(None if written is None else str(written.value), value)


def _value(
    reader: RecipeReader, node: yaml.Node, path: str, parameter: Parameter | None
) -> Scalar | tuple[Scalar, ...] | None:
    """A scalar or a gradient."""
    key = _key(path)
    if isinstance(node, yaml.ScalarNode):
        return _scalar(reader, node, key, parameter)
    if not node.value:
        reader.problem(node, f'"{key}" is an empty list; a gradient needs at least one value')
        return None
    if not isinstance(node, yaml.SequenceNode) or not all(isinstance(item, yaml.ScalarNode) for item in node.value):
        reader.problem(node, f'"{key}" must be one value or one flat list of values here')
        return None
    if parameter is not None and parameter.kind is int and len(node.value) > 1:
        reader.problem(node, f'"{key}" is a whole number and cannot be a gradient')
        return None
    points = [_scalar(reader, item, key, parameter) for item in node.value]
    return None if None in points else tuple(point for point in points if point is not None)


def _scalar(reader: RecipeReader, node: yaml.ScalarNode, key: str, parameter: Parameter | None) -> Scalar | None:
    """One leaf, checked for type, choices, range and NaN. None, with a problem noted, when it is wrong."""
    value, expected = _typed(node, parameter)
    if value is None:
        near = nearest(node.value, [str(choice) for choice in parameter.choices]) if parameter else None
        hint = f'; did you mean "{near}"?' if near and near != node.value else ""
        reader.problem(node, f'"{key}" must be {expected}, not {shown(node)}{hint}')
        return None
    if isinstance(value, float) and not math.isfinite(value):
        reader.problem(node, f'"{key}" must be a finite number, not {shown(node)}')
        return None
    range_ = parameter.range if parameter else None
    if range_ is not None and not isinstance(value, str) and not range_.low <= value <= range_.high:
        low, high = f"{range_.low:g}", f"{range_.high:g}"
        span = f"at least {low}" if math.isinf(range_.high) else f"between {low} and {high}"
        reader.problem(node, f'"{key}" must be {span}, not {shown(node)}')
        return None
    return value


def _typed(node: yaml.ScalarNode, parameter: Parameter | None) -> tuple[Scalar | None, str]:
    """(the value in the parameter's type, or None; what was expected)"""
    if parameter is None:  # the method is unknown, which is a problem already; only NaN is looked for
        number = as_number(node)
        return str(node.value) if number is None else number, "a value"
    if parameter.choices:
        return _choice(node, parameter), one_of([_word(choice) for choice in parameter.choices])
    if parameter.kind is bool:
        return as_boolean(node), "true or false"
    if parameter.kind is int:
        return _whole(node), "a whole number"
    if parameter.kind is float:
        return as_number(node), "a number"
    return str(node.value) if node.tag.endswith(":str") else None, "a string"


def _whole(node: yaml.ScalarNode) -> int | None:
    number = as_number(node)
    return None if number is None or not math.isfinite(number) or number != int(number) else int(number)


def _choice(node: yaml.ScalarNode, parameter: Parameter) -> Scalar | None:
    flag = as_boolean(node)
    if flag is not None and any(choice is flag for choice in parameter.choices):
        return flag
    return next((str(choice) for choice in parameter.choices if choice == node.value), None)


def _word(choice: object) -> str:
    return str(choice).lower() if isinstance(choice, bool) else f'"{choice}"'


@dataclass(frozen=True)
class Levels:
    """The settings of an input, or of what all inputs share, innermost first.

    Attributes:
        owner: what messages call it.
        tensor: the name that filters are matched with.
    """

    settings: Sequence[Settings]
    owner: str
    tensor: str


class ParameterValues:
    """The values of methods' parameters, for one tensor after another; remembers which have none."""

    def __init__(self) -> None:
        self._unset: dict[tuple[str, str], list[str]] = {}

    def of(
        self, parameters: Sequence[Parameter], shared: Levels, inputs: Sequence[Levels], t: float
    ) -> dict[str, Any] | None:
        """Each parameter's number, or a tuple of one for each input; None if a required one has none."""
        values: dict[str, Any] = {}
        complete = True
        for parameter in parameters:
            found = [self._value(parameter, each, t) for each in (inputs if parameter.per_model else (shared,))]
            complete = complete and not (parameter.required and None in found)
            if any(value is not None for value in found):
                values[parameter.name] = tuple(found) if parameter.per_model else found[0]
        return values if complete else None

    def _value(self, parameter: Parameter, levels: Levels, t: float) -> Any:
        value = resolve(levels.settings, parameter.name, levels.tensor, t)
        if value is None:
            if parameter.required:
                self._unset.setdefault((parameter.name, levels.owner), []).append(levels.tensor)
            return parameter.default
        return parameter.kind(value) if parameter.kind in (bool, float) else value

    def problems(self, where: str | None) -> Iterator[Problem]:
        for (key, owner), tensors in self._unset.items():
            said = f'"{key}" of {owner} has no value for {some(tensors)}.'
            yield Problem(said, where, "Add a value without a filter.")


def resolve(levels: Sequence[Settings], key: str, tensor_name: str, t: float) -> Scalar | None:
    """One number from the levels of a recipe, the innermost first.

    Args:
        levels: source or model, then slice, then module, then top level.
        key: the parameter's name.
        tensor_name: what filters are matched with (the input's name for per-model parameters, else the output's).
        t: place in the slice, i/(L-1) in [0, 1].

    Returns:
        The value of the first level that has one for this tensor; None if none has.
    """
    for settings in levels:
        if key in settings:
            value = evaluate(settings[key], tensor_name, t)
            if value is not None:
                return value
    return None


def evaluate(setting: Setting, tensor_name: str, t: float) -> Scalar | None:
    """A setting at place t: a scalar as it is, a gradient interpolated, conditions tried in order (None: no match)."""
    if not isinstance(setting, tuple):
        return setting
    if setting and isinstance(setting[0], Conditional):
        for condition in setting:
            assert isinstance(condition, Conditional)
            if condition.matches(tensor_name):
                return evaluate(condition.value, tensor_name, t)
        return None
    return _gradient(setting, t)  # type: ignore[arg-type]


def _gradient(points: tuple[Scalar, ...], t: float) -> Scalar:
    """Linear between numbers; a list of booleans or strings picks floor(t * (n - 1))."""
    if any(isinstance(point, (bool, str)) for point in points):
        return points[int(t * (len(points) - 1))]
    place = t * (len(points) - 1)
    low = min(int(place), len(points) - 1)
    high = min(low + 1, len(points) - 1)
    fraction = place - low
    return points[low] * (1 - fraction) + points[high] * fraction  # type: ignore[operator]
