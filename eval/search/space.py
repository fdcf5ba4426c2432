"""A recipe with open places: what a search may choose, and the plain recipe that each choice makes.

Places are found in the tree of the YAML text before the recipe's schema reads it, so that any value may be open. A
trial's values are put into that tree, and the ordinary parser reads the result: problems have the lines of the file.

A place is conditional: a parameter that the trial's method does not take is left out, and not asked for. So is a base
where the method needs none.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import yaml

from eval.search.located import located
from eval.search.places import OpenPlace, Value, expanded, is_open, read_place
from merge.errors import Problem, RecipeError
from merge.methods.registry import all_methods
from merge.planning.load import find_recipe
from merge.planning.resolve import resolve
from merge.recipe.build import draft_of
from merge.recipe.model import Recipe
from merge.schema.document import FileKind, read_document, read_text, written
from merge.schema.reader import Reader, join
from merge.schema.scalars import NULL

KIND = FileKind(
    *("recipe", "merge_method: linear", "merge_method and models"),
    several="a search takes a recipe of one document; merge its other stages first with merge run",
)
MOST = 200  # open places
_COMBINATIONS = 64  # of methods that are checked beforehand
_LEVELS = ("merge_method", "slices", "modules")  # a mapping with one of these says which methods apply inside it
_UNNAMED = ("parameters", "value", "models", "slices", "sources", "modules")  # left out of the names of places
_Scope = tuple[tuple[str, ...], tuple[str, ...]]  # the methods that apply, and those that may with other values
_NO_METHOD: _Scope = ((), ())


@dataclass(frozen=True)
class Space:
    """
    Attributes:
        root: the tree, whose open places are mappings.
        places: in the order of the file.
        by_node: id of an open mapping -> its place.
    """

    root: yaml.MappingNode
    file: str | None
    places: tuple[OpenPlace, ...]
    by_node: Mapping[int, OpenPlace] = field(repr=False)

    @staticmethod
    def load(path: str | Path) -> Space:
        """Raises RecipeError with all problems of the open places, and of the recipes that they make."""
        found = find_recipe(Path(path))
        return Space.parse(read_text(found, KIND), str(found))

    @staticmethod
    def parse(text: str, file: str | None = None) -> Space:
        """As `load`, of a text; relative model paths are also looked for beside `file`."""
        return Space.of(read_document(text, file, KIND), file)

    @staticmethod
    def of(root: yaml.MappingNode, file: str | None) -> Space:
        """As `parse`, of a tree."""
        reader = Reader(file)
        finder = _PlaceFinder(reader)
        whole = finder.walk(root, "", ())
        reader.raise_if_any()
        assert isinstance(whole, yaml.MappingNode)
        if len(finder.places) > MOST:
            raise RecipeError(Problem(f"has {len(finder.places):,} open places; at most {MOST} can be searched", file))
        space = Space(whole, file, tuple(finder.places), finder.by_node)
        space._check()
        return space

    @property
    def methods(self) -> tuple[str, ...]:
        """Every method that a trial may have, in the order of the file."""
        return tuple(dict.fromkeys(_PlaceFiller(self, {}).possible(self.root)))

    def place(self, name: str) -> OpenPlace:
        return next(place for place in self.places if place.name == name)

    def ask(self, suggest: Callable[[OpenPlace], Value]) -> dict[str, Value]:
        """The values of one trial. Methods are asked first: they decide which other places there are."""
        values = {place.name: suggest(place) for place in self.places if place.is_method}
        for place in self.active(values):
            if place.name not in values:
                values[place.name] = place.rounded(suggest(place))
        return values

    def active(self, values: Mapping[str, Value]) -> list[OpenPlace]:
        """The places that count with these methods, in the order of the file."""
        filler = _PlaceFiller(self, values)
        filler.walk(self.root, _NO_METHOD)
        return list(dict.fromkeys(filler.met))

    def recipe(self, values: Mapping[str, Value]) -> Recipe:
        """The plain recipe. Its text names local models by their absolute paths, so that it may lie anywhere.

        Raises:
            RecipeError: with the lines of the file that has the open places.
        """
        root = _PlaceFiller(self, values).walk(self.root, _NO_METHOD)
        assert isinstance(root, yaml.MappingNode)
        recipe = resolve(draft_of(root, written(root), self.file))
        return dataclasses.replace(recipe, text=written(located(root, recipe)))

    def combinations(self) -> Iterator[dict[str, Value]]:
        """Every choice of methods."""
        open_methods = [place for place in self.places if place.is_method]
        for chosen in itertools.product(*(place.choices for place in open_methods)):
            yield {place.name: value for place, value in zip(open_methods, chosen, strict=True)}

    def _check(self) -> None:
        """Reads the recipes at the ends of all places and with every choice, for each method."""
        problems: dict[tuple[str | None, str], Problem] = {}
        advice: list[str] = []
        for methods in itertools.islice(self.combinations(), _COMBINATIONS):
            for turn in range(max([2, *(len(place.choices) for place in self.places)])):
                try:
                    self.recipe(self.ask(functools.partial(_corner, turn, methods)))
                except RecipeError as error:
                    for problem in error.problems:
                        problems.setdefault((problem.where, problem.message.partition(",")[0]), problem)
                    advice += error.advice
        if problems:
            raise RecipeError(list(problems.values()), list(dict.fromkeys(advice)))


def _corner(turn: int, methods: Mapping[str, Value], place: OpenPlace) -> Value:
    """The value of a place in one of the recipes that are checked beforehand."""
    if place.is_method:
        return methods[place.name]
    points = place.points(2)
    return points[turn % len(points)]


class _PlaceFinder:
    """Finds the open places, and writes out `knots` and `filters`."""

    def __init__(self, reader: Reader) -> None:
        self._reader = reader
        self.places: list[OpenPlace] = []
        self.by_node: dict[int, OpenPlace] = {}
        self._seen: dict[int, tuple[yaml.Node, yaml.Node]] = {}  # id -> what it is of, which keeps it, and its result

    def walk(self, node: yaml.Node, path: str, name: tuple[str, ...]) -> yaml.Node:
        """The tree with its places written out; what an alias repeats is one place."""
        if id(node) not in self._seen:
            self._seen[id(node)] = node, self._walk(node, path, name)
        return self._seen[id(node)][1]

    def _walk(self, node: yaml.Node, path: str, name: tuple[str, ...]) -> yaml.Node:
        if isinstance(node, yaml.MappingNode) and is_open(node):
            if any(key.value in ("knots", "filters") for key, _ in node.value):
                return self.walk(expanded(self._reader, node, path), path, name)
            self._add(node, path, name)
            return node
        if isinstance(node, yaml.MappingNode):
            pairs = [(key, self.walk(value, *name_inside(path, name, str(key.value)))) for key, value in node.value]
            return yaml.MappingNode(node.tag, pairs, node.start_mark, node.end_mark, node.flow_style)
        if isinstance(node, yaml.SequenceNode):
            labels = [label_of(item, i, name) for i, item in enumerate(node.value)]
            items = [
                self.walk(item, join(path, str(i)), (*name, label))
                for i, (item, label) in enumerate(zip(node.value, labels, strict=True))
            ]
            return yaml.SequenceNode(node.tag, items, node.start_mark, node.end_mark, node.flow_style)
        return node

    def _add(self, node: yaml.MappingNode, path: str, name: tuple[str, ...]) -> None:
        said = ".".join(name)
        if any(place.name == said for place in self.places):
            said = path
        place = read_place(self._reader, node, path, said)
        if place is not None:
            self.places.append(place)
            self.by_node[id(node)] = place


def name_inside(path: str, name: tuple[str, ...], key: str) -> tuple[str, tuple[str, ...]]:
    return join(path, key), name if key in _UNNAMED else (*name, key)


def label_of(item: yaml.Node, number: int, name: tuple[str, ...]) -> str:
    """What an item of a list is called: by its model, its filter, or its number."""
    pairs = {key.value: value for key, value in item.value} if isinstance(item, yaml.MappingNode) else {}
    if isinstance(model := pairs.get("model"), yaml.ScalarNode):
        return Path(str(model.value)).name
    if isinstance(part := pairs.get("filter"), yaml.ScalarNode):
        return str(part.value)
    return "rest" if "value" in pairs and name else str(number)


class _PlaceFiller:
    """Puts values into the tree; notes the places that it comes to."""

    def __init__(self, space: Space, values: Mapping[str, Value]) -> None:
        self._places, self._values = space.by_node, values
        self._methods = all_methods()
        self.met: list[OpenPlace] = []

    def walk(self, node: yaml.Node, scope: _Scope) -> yaml.Node:
        place = self._places.get(id(node))
        if place is not None:
            self.met.append(place)
            return place.node(self._values.get(place.name, _first(place)), node)
        if isinstance(node, yaml.MappingNode):
            scope = self._scope(node, scope)
            pairs = [pair for key, value in node.value for pair in self._pair(key, value, scope)]
            return yaml.MappingNode(node.tag, pairs, node.start_mark, node.end_mark, node.flow_style)
        if isinstance(node, yaml.SequenceNode):
            items = [self.walk(item, scope) for item in node.value]
            return yaml.SequenceNode(node.tag, items, node.start_mark, node.end_mark, node.flow_style)
        return node

    def _pair(self, key: yaml.Node, value: yaml.Node, scope: _Scope) -> Iterator[tuple[yaml.Node, yaml.Node]]:
        now, ever = scope
        if key.value == "base_model" and len(ever) > 1 and not any(map(self._starts_from_base, now)):
            return
        if key.value == "parameters" and isinstance(value, yaml.MappingNode):
            kept = [(k, v) for k, v in value.value if self._takes(now, k.value) or not self._takes(ever, k.value)]
            value = yaml.MappingNode(value.tag, kept, value.start_mark, value.end_mark, value.flow_style)
        filled = self.walk(value, scope)
        place = self._places.get(id(value))
        if place is not None and filled.tag == NULL:
            return  # a choice of nothing
        if key.value != "parameters" or filled.value:
            yield key, filled

    def _scope(self, node: yaml.MappingNode, outer: _Scope) -> _Scope:
        if not any(key.value in _LEVELS for key, _ in node.value):
            return outer
        now = tuple(dict.fromkeys(self._named(node, chosen=True)))
        ever = tuple(dict.fromkeys(self._named(node, chosen=False)))
        return now or outer[0], ever or outer[1]

    def possible(self, node: yaml.Node) -> Iterator[str]:
        """The methods that a part of the recipe may have."""
        return self._named(node, chosen=False)

    def _named(self, node: yaml.Node, chosen: bool) -> Iterator[str]:
        for key, value in node.value if isinstance(node, yaml.MappingNode) else ():
            if key.value == "merge_method":
                place = self._places.get(id(value))
                if place is None:
                    yield str(value.value)
                elif chosen and place.name in self._values:
                    yield str(self._values[place.name])
                else:
                    yield from map(str, place.choices)
            elif key.value == "modules" and isinstance(value, yaml.MappingNode):
                for _, module in value.value:
                    yield from self._named(module, chosen)
            elif key.value == "slices" and isinstance(value, yaml.SequenceNode):
                for piece in value.value:
                    yield from self._named(piece, chosen)

    def _takes(self, names: Sequence[str], key: str) -> bool:
        known = (self._methods[name].parameter(key) for name in names if name in self._methods)
        return any(parameter is not None and parameter.has_effect for parameter in known)

    def _starts_from_base(self, name: str) -> bool:
        """Whether a method does something else with a base than to average it with the models."""
        method = self._methods.get(name)
        return method is None or method.base == "required" or (method.base == "optional" and not method.base_is_input)


def _first(place: OpenPlace) -> Value:
    return place.points(2)[0]
