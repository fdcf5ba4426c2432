"""What a search has to beat: the parents, their uniform average, each method's defaults, and recipes that are named."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from eval.blends import blend_recipe
from eval.search.judges import Candidate
from eval.search.places import OpenPlace, Value
from eval.search.space import Space
from merge.errors import RecipeError, UsageError
from merge.methods.registry import Parameter, all_methods
from merge.planning.resolve import made_recipe
from merge.recipe.mentioned import mentioned
from merge.recipe.model import ModelRef, Recipe

PARENT, DEFAULT = "parent", "default"


def baselines(space: Space, named: Sequence[str] = ()) -> list[tuple[str, Candidate]]:
    """(kind, candidate) for each, in order.

    Args:
        named: recipe files.

    Raises:
        RecipeError: a named recipe that is wrong.
        UsageError: one with open places.
    """
    first = space.recipe(space.ask(lambda place: _default(space, place, {})))
    found = [(PARENT, _parent(ref)) for ref in _models(first)]
    with contextlib.suppress(RecipeError):  # of models that differ in shape there is no average
        average = Candidate("uniform average", recipe=_average(first))
        average.plan  # noqa: B018  # checked here
        found.append((DEFAULT, average))
    found += [(DEFAULT, candidate) for candidate in _defaults(space)]
    for file in named:
        other = Space.load(file)
        if other.places:
            raise UsageError(f"--baseline {file}: has open places, and a baseline is a plain recipe.")
        recipe = other.recipe({})
        found.append((DEFAULT, Candidate(recipe.name or Path(file).stem, recipe=recipe)))
    return [(kind, candidate) for kind, candidate in _named_apart(found)]


def _named_apart(found: Sequence[tuple[str, Candidate]]) -> Iterator[tuple[str, Candidate]]:
    taken: dict[str, int] = {}
    for kind, each in found:
        taken[each.name] = taken.get(each.name, 0) + 1
        name = each.name if taken[each.name] == 1 else f"{each.name} ({taken[each.name]})"
        yield kind, Candidate(name, each.values, each.recipe, each.path)


def _parent(ref: ModelRef) -> Candidate:
    path = ref.path if ref.revision is None else f"{ref.path}@{ref.revision}"
    text = path if ref.adapter is None else f"{path}+{ref.adapter.path}"
    return Candidate((ref.adapter or ref).path.rpartition("/")[2], path=text)


def _models(recipe: Recipe) -> list[ModelRef]:
    """The base first, then the models as they are listed."""
    return [ref for ref, _ in mentioned(recipe).values()]


def _average(recipe: Recipe) -> Recipe:
    base = recipe.base_model
    texts = [str(_parent(ref).path) for ref in _models(recipe) if ref != base]
    return made_recipe(blend_recipe(texts, [1.0] * len(texts), "average"))


def _defaults(space: Space) -> Iterator[Candidate]:
    """One recipe for each choice of methods, with every other open place at its parameter's default."""
    for methods in space.combinations():
        values = space.ask(lambda place, methods=methods: _default(space, place, methods))  # type: ignore[misc]
        name = " and ".join(map(str, methods.values())) or " and ".join(space.methods)
        with contextlib.suppress(RecipeError):
            candidate = Candidate(f"{name}, defaults", values, space.recipe(values))
            candidate.plan  # noqa: B018  # a method that these models do not suit has no defaults
            yield candidate


def _default(space: Space, place: OpenPlace, methods: Mapping[str, Value]) -> Value:
    """A parameter's own default; of a required one 1 for weights, else the middle; the first choice of all else."""
    if place.name in methods:
        return methods[place.name]
    if place.is_method or "parameters." not in place.path:
        return place.points(2)[0]
    parameter = _parameter(space, place, methods)
    if parameter is not None and not parameter.required and isinstance(parameter.default, (int, float, bool, str)):
        default = parameter.default
        return float(default) if place.kind == "search" and not isinstance(default, str) else default
    if place.kind == "choice":
        return place.choices[0]
    return 1.0 if parameter is not None and parameter.name == "weight" else place.points(3)[1]


def _parameter(space: Space, place: OpenPlace, methods: Mapping[str, Value]) -> Parameter | None:
    key = place.path.rpartition("parameters.")[2].partition(".")[0]
    names = [str(value) for value in methods.values()] or list(space.methods)
    known = (all_methods()[name].parameter(key) for name in names if name in all_methods())
    return next((parameter for parameter in known if parameter is not None), None)


def fits(space: Space, values: Mapping[str, Value]) -> bool:
    """Whether a trial could have these values."""
    return bool(values) and all(place.holds(values.get(place.name)) for place in space.active(values))
