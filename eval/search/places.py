"""Reads one open place of a recipe: `{search: [0, 1]}`, `{choice: [ties, linear]}` or `{int: [1, 8]}`.

search   a number between two ends; `log: true` on a logarithmic scale, `step: 0.1` only multiples above the lower end
int      a whole number between two ends, with the same keys
choice   one of the listed values, whatever they are
knots    with `search` or `int`: a gradient over the layers with that many points, each a place of its own
filters  a value for the tensors of each filter, and one for all others, each a place of its own
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

import yaml

from merge.recipe.keys import OPEN_PLACE
from merge.schema.document import line_of, written
from merge.schema.keys import Key
from merge.schema.reader import Fields, Reader
from merge.schema.scalars import MAP, NULL, SEQ, STR, as_boolean, as_integer, as_number, shown

if TYPE_CHECKING:
    from optuna.distributions import BaseDistribution

Value = float | int | bool | str | None
KINDS = OPEN_PLACE
_KEYS = {
    **dict.fromkeys(KINDS, Key()),
    "log": Key("bool"),
    "step": Key("float", above=0),
    "knots": Key("int", low=2, high=100),
    "filters": Key("words"),
}
_DIGITS = 4  # significant ones of a number that is written into a recipe


@dataclass(frozen=True)
class OpenPlace:
    """One open place.

    Attributes:
        name: in the study, on pages and for `merge sweep --set`: "density", "sort.weight", "merge_method".
        path: in the recipe: "models.1.parameters.weight".
        choices: the values, or what is shown of those that are no scalars; nodes: as they are written.
    """

    name: str
    path: str
    line: int
    kind: Literal["search", "int", "choice"]
    low: float = 0.0
    high: float = 0.0
    step: float | None = None
    log: bool = False
    choices: tuple[Value, ...] = ()
    nodes: tuple[yaml.Node, ...] = field(default=(), compare=False, repr=False)

    @property
    def is_method(self) -> bool:
        return self.path.rpartition(".")[2] == "merge_method"

    def distribution(self) -> BaseDistribution:
        from optuna import distributions

        if self.kind == "choice":
            return distributions.CategoricalDistribution(self.choices)
        if self.kind == "int":
            step = 1 if self.step is None else int(self.step)
            return distributions.IntDistribution(int(self.low), int(self.high), self.log, step)
        return distributions.FloatDistribution(self.low, self.high, self.log, self.step)

    def rounded(self, value: Value) -> Value:
        """As it is written into a recipe: few digits, within the bounds."""
        if self.kind != "search" or not isinstance(value, float):
            return value
        return min(max(float(f"{value:.{_DIGITS}g}"), self.low), self.high)

    def node(self, value: Value, at: yaml.Node) -> yaml.Node:
        """The value as a node at this place of the file."""
        if self.kind == "choice":
            return self.nodes[self.choices.index(value)]
        return scalar(value, at)

    def holds(self, value: Value) -> bool:
        if self.kind == "choice":
            return value in self.choices
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        return number and self.low <= float(value or 0) <= self.high

    def points(self, n: int) -> list[Value]:
        """n values from end to end, fewer where there are fewer; all choices."""
        if self.kind == "choice":
            return list(self.choices)
        if self.step is not None or self.kind == "int":
            step = self.step or 1
            count = int((self.high - self.low) / step + 1e-9) + 1
            places = sorted({round(i * (count - 1) / max(1, n - 1)) for i in range(n)} if count > n else range(count))
            values = [self.low + i * step for i in places]
        elif self.log:
            ratio = math.log(self.high / self.low)
            values = [self.low * math.exp(ratio * i / max(1, n - 1)) for i in range(n)]
        else:
            values = [self.low + (self.high - self.low) * i / max(1, n - 1) for i in range(n)]
        return [int(value) if self.kind == "int" else self.rounded(float(value)) for value in values]


def scalar(value: Value, at: yaml.Node) -> yaml.ScalarNode:
    """A value as a node that stands where `at` stands."""
    made = yaml.representer.SafeRepresenter().represent_data(value)
    return yaml.ScalarNode(made.tag, made.value, at.start_mark, at.end_mark)


def is_open(node: yaml.Node) -> bool:
    """Whether a mapping has one of the words of open places with a value that no other mapping of a recipe has."""
    return isinstance(node, yaml.MappingNode) and any(
        key.value in KINDS and not isinstance(value, yaml.MappingNode) for key, value in node.value
    )


def expanded(reader: Reader, node: yaml.MappingNode, path: str) -> yaml.Node:
    """A place with `knots` or `filters` as the gradient or the conditions of several places that it stands for."""
    fields = reader.fields(node, path, _KEYS, "an open place")
    knots = fields.integer("knots") if "knots" in fields else None
    filters = fields.value("filters") if "filters" in fields else None
    pairs = [(key, value) for key, value in node.value if key.value not in ("knots", "filters")]

    def place() -> yaml.MappingNode:
        return yaml.MappingNode(MAP, list(pairs), node.start_mark, node.end_mark, flow_style=True)

    def gradient() -> yaml.Node:
        if not knots:
            return place()
        return yaml.SequenceNode(SEQ, [place() for _ in range(knots)], node.start_mark, node.end_mark, flow_style=True)

    if not filters:
        return gradient()
    conditions = []
    for word in (*filters, None):
        pair = [(scalar("value", node), gradient())]
        if word is not None:
            pair.insert(0, (scalar("filter", node), scalar(word, node)))
        conditions.append(yaml.MappingNode(MAP, pair, node.start_mark, node.end_mark, flow_style=True))
    return yaml.SequenceNode(SEQ, conditions, node.start_mark, node.end_mark)


def read_place(reader: Reader, node: yaml.MappingNode, path: str, name: str) -> OpenPlace | None:
    """None, with a problem noted, for a place that cannot be read."""
    before = reader.n_problems
    fields = reader.fields(node, path, _KEYS, "an open place")
    given = [kind for kind in KINDS if kind in fields]
    if len(given) != 1:
        reader.problem(node, f"an open place has one of {', '.join(KINDS)}, not {' and '.join(given)}", path)
        return None
    if given == ["choice"]:
        return _choice(reader, fields, node, path, name)
    kind: Literal["search", "int"] = "int" if given == ["int"] else "search"
    ends = list(_ends(fields[kind], kind))
    if len(ends) != 2 or not ends[0] < ends[1]:
        what = "two whole numbers" if kind == "int" else "two numbers"
        reader.problem(fields[kind], f'"{kind}" must be {what}, [lowest, highest], not {_shown(fields[kind])}', path)
        return None
    log = bool(fields.boolean("log")) if "log" in fields else False
    step = fields.number("step") if "step" in fields else None
    if log and (ends[0] <= 0 or step is not None):
        why = "a lower end above 0" if ends[0] <= 0 else "no step"
        reader.problem(fields["log"], f'"log" needs {why}', path)
    if kind == "int" and step is not None and step != int(step):
        reader.problem(fields["step"], f'"step" must be a whole number here, not {shown(fields["step"])}', path)
    if reader.n_problems > before:
        return None
    return OpenPlace(name, path, line_of(node), kind, ends[0], ends[1], step, log)


def _ends(node: yaml.Node, kind: str) -> Iterator[float]:
    for item in node.value if isinstance(node, yaml.SequenceNode) else ():
        found = as_integer(item) if kind == "int" else as_number(item) if isinstance(item, yaml.ScalarNode) else None
        if found is not None and math.isfinite(found):
            yield float(found)


def _choice(reader: Reader, fields: Fields, node: yaml.MappingNode, path: str, name: str) -> OpenPlace | None:
    items = reader.items(fields["choice"], path)
    values = [value_of(item) for item in items]
    if len(items) < 2 or len(set(map(repr, values))) < len(values):
        reader.problem(
            fields["choice"], f'"choice" needs at least two different values, not {_shown(fields["choice"])}'
        )
        return None
    if extra := [key for key in ("log", "step") if key in fields]:
        reader.problem(fields[extra[0]], f'"{extra[0]}" cannot be combined with "choice"', path)
        return None
    return OpenPlace(name, path, line_of(node), "choice", choices=tuple(values), nodes=tuple(items))


def value_of(node: yaml.Node) -> Value:
    """A scalar as it is meant; anything else as text."""
    if not isinstance(node, yaml.ScalarNode):
        return written(node, flow=True)
    if node.tag == NULL:
        return None
    if node.tag == STR:
        return str(node.value)
    if node.tag.endswith(":bool"):
        return as_boolean(node)
    whole = as_integer(node)
    return whole if whole is not None else as_number(node)


def _shown(node: yaml.Node) -> str:
    return written(node, flow=True)[:60] if isinstance(node, yaml.SequenceNode) else shown(node)
