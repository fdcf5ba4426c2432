"""Sweeps: a plain recipe whose values are set to each of several, for a curve or a map of the scores.

`weight=.1:.9:9` are nine values from end to end, `normalize=true,false` these two. A name means every value of the
recipe whose path ends so (`weight`, `sort.weight`, `parameters.lambda`); all get the same. A parameter that is nowhere
is added to those of the whole recipe.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import yaml

from eval.search.places import Value, scalar, value_of
from eval.search.record import SearchRow
from eval.search.run import Found
from eval.search.scatter import Mark, heat, scatter
from eval.search.space import KIND, Space, label_of, name_inside
from merge.errors import UsageError
from merge.planning.load import find_recipe
from merge.schema.document import compose_value, read_document, read_text
from merge.schema.names import suggest
from merge.schema.reader import join
from merge.schema.scalars import MAP, SEQ, STR
from merge.show.page import html_document, html_figure, html_row, html_table

MOST = 10_000  # points


@dataclass(frozen=True)
class Setting:
    """One name and the values it is set to."""

    name: str
    values: tuple[Value, ...]


def setting_of(text: str) -> Setting:
    """`NAME=low:high:n` or `NAME=value,value`. Raises UsageError for another text."""
    name, equals, written = text.partition("=")
    parts = written.split(":")
    values: list[Value] = []
    try:
        if len(parts) == 3:
            low, high, n = float(parts[0]), float(parts[1]), int(parts[2])
            values = [float(f"{low + (high - low) * i / (n - 1):.6g}") for i in range(n)]
        elif len(parts) == 1:
            nodes = [compose_value(word.strip()) for word in written.split(",")]
            values = [value_of(node) for node in nodes if isinstance(node, yaml.ScalarNode)]
    except (ValueError, ZeroDivisionError):
        values = []
    if not name or not equals or len(values) < 2 or len(set(map(repr, values))) < len(values):
        raise UsageError(f'--set "{text}": expected NAME=LOW:HIGH:POINTS or NAME=VALUE,VALUE, with two values or more.')
    return Setting(name.strip(), tuple(values))


def swept(recipe: Path, settings: Sequence[Setting]) -> Space:
    """The recipe with a choice of values at each name.

    Raises:
        RecipeError: with all problems of the recipes.
        UsageError: a name that is neither in the recipe nor a parameter; the same name twice.
    """
    file = find_recipe(recipe)
    root = read_document(read_text(file, KIND), str(file), KIND)
    if len({setting.name for setting in settings}) < len(settings):
        raise UsageError("--set: the same name twice.")
    for setting in settings:
        values = [scalar(value, root) for value in setting.values]
        items = yaml.SequenceNode(SEQ, values, root.start_mark, root.end_mark, flow_style=True)
        place = yaml.MappingNode(MAP, [(scalar("choice", root), items)], root.start_mark, root.end_mark)
        known: list[str] = []
        if not _replace(root, "", (), setting.name, place, known):
            _add(root, setting.name, place, known)
    return Space.of(root, str(file))


def _replace(
    node: yaml.Node, path: str, name: tuple[str, ...], wanted: str, place: yaml.Node, known: list[str]
) -> bool:
    """Puts the place where values are called so; notes the names that there are."""
    found = False

    def child(value: yaml.Node, path: str, name: tuple[str, ...], put: Callable[[yaml.Node], None]) -> bool:
        said = ".".join(name)
        plain = not isinstance(value, yaml.MappingNode) or value is place
        if plain and any(f".{text}".endswith(f".{wanted}") for text in (path, said)):
            put(place)
            return True
        if isinstance(value, yaml.ScalarNode):
            known.append(said)
        return _replace(value, path, name, wanted, place, known)

    if isinstance(node, yaml.MappingNode):
        for i, (key, value) in enumerate(node.value):
            where = name_inside(path, name, str(key.value))

            def put(new: yaml.Node, i: int = i, key: yaml.Node = key, at: yaml.MappingNode = node) -> None:
                at.value[i] = (key, new)

            found |= child(value, *where, put)
    elif isinstance(node, yaml.SequenceNode):
        for i, value in enumerate(node.value):

            def set_item(new: yaml.Node, i: int = i, at: yaml.SequenceNode = node) -> None:
                at.value[i] = new

            found |= child(value, join(path, str(i)), (*name, label_of(value, i, name)), set_item)
    return found


def _add(root: yaml.MappingNode, name: str, place: yaml.Node, known: list[str]) -> None:
    """Adds a parameter to those of the whole recipe."""
    from merge.methods.registry import all_methods

    if not any(method.parameter(name) is not None for method in all_methods().values()):
        raise UsageError(f"--set {name}: is neither a value of the recipe nor a parameter; {suggest(name, known)}")
    for key, value in root.value:
        if key.value == "parameters" and isinstance(value, yaml.MappingNode):
            value.value.append((scalar(name, root), place))
            return
    pair = (yaml.ScalarNode(STR, name, root.start_mark, root.end_mark), place)
    parameters = yaml.MappingNode(MAP, [pair], root.start_mark, root.end_mark)
    root.value.append((scalar("parameters", root), parameters))


def points_of(space: Space) -> list[dict[str, Value]]:
    """Every combination, the last name fastest."""
    every = itertools.product(*(place.choices for place in space.places))
    points = [dict(zip([place.name for place in space.places], values, strict=True)) for values in every]
    if len(points) > MOST:
        raise UsageError(f"--set: {len(points):,} points; at most {MOST:,} can be measured.")
    return points


def columns(found: Found) -> list[tuple[str, Callable[[SearchRow], float | None]]]:
    """The objective, and each task if there are several, with a row's number."""

    def task(name: str) -> Callable[[SearchRow], float | None]:
        return lambda row: row.scores[name].value if name in row.scores else None

    names = found.objective.names(found.tasks)
    first = [(names[0], lambda row: row.values[0] if row.values else None)] if len(found.tasks) > 1 else []
    return [*first, *((name, task(name)) for name in found.tasks)]


def points(found: Found) -> list[SearchRow]:
    return [row for row in found.rows if row.kind == "trial" and row.state in ("whole", "refused")]


def csv(found: Found) -> str:
    """A line for each point."""
    said = columns(found)
    heads = [*(place.name for place in found.space.places), *(name for name, _ in said)]
    lines = [",".join(heads)]
    for row in points(found):
        numbers = [value(row) for _, value in said]
        values = [row.written[place.name] for place in found.space.places]
        lines.append(",".join("" if value is None else str(value) for value in (*values, *numbers)))
    return "\n".join(lines) + "\n"


def sweep_page(found: Found) -> str:
    """A curve for one name, a map for two; beside it a table."""
    title = f"Sweep of {', '.join(place.name for place in found.space.places)}"
    figures = [html_figure(name, picture) for name, picture in _pictures(found)]
    said = columns(found)
    heads = ["point", *(name for name, _ in said)]
    rows = []
    for row in points(found):
        numbers = [value(row) for _, value in said]
        name = ", ".join(f"{key} {value}" for key, value in row.written.items())
        rows.append(html_row(name, [row.refused or "" if each is None else f"{each:.4g}" for each in numbers]))
    note = (
        "Scores on all items asked. The best point of a sweep is partly the luckiest: merge search reports on others."
    )
    parts = [f"<h1>{title}</h1>", f'<p class="soft">{note}</p>', f'<div class="grid">{"".join(figures)}</div>']
    return html_document(title, [*parts, "<h2>Points</h2>", html_table(heads, rows)])


def _pictures(found: Found) -> Iterator[tuple[str, str]]:
    first, *others = found.space.places
    for name, value in columns(found):
        known = [(row, number) for row in points(found) if (number := value(row)) is not None]
        if not known:
            continue
        if not others:
            numeric = all(isinstance(choice, (int, float)) and not isinstance(choice, bool) for choice in first.choices)
            words = [] if numeric else [str(choice) for choice in first.choices]
            marks = [
                Mark(
                    float(row.written[first.name] or 0) if numeric else first.choices.index(row.written[first.name]),
                    number,
                    "merge",
                    row.name,
                )
                for row, number in known
            ]
            parents = [number for row in found.rows if row.kind == "parent" and (number := value(row)) is not None]
            levels = [(max(parents), "best parent")] if parents else []
            curve = [(mark.x, mark.y) for mark in marks] if numeric else []
            picture = scatter(
                marks, first.name, name, f"{name} over {first.name}", curve=curve, levels=levels, words=words
            )
        else:
            second = others[0]
            cells = {(row.written[first.name], row.written[second.name]): number for row, number in known}
            values = [[cells.get((x, y)) for x in first.choices] for y in second.choices]
            xs, ys = ([_short(choice) for choice in place.choices] for place in (first, second))
            picture = heat(xs, ys, values, first.name, second.name, f"{name} over {first.name} and {second.name}")
        yield name, picture


def _short(value: Value) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
