"""Open places of a recipe: what is asked, what the recipe of a choice says, and what is wrong with a place."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from eval.search.baselines import baselines, fits
from eval.search.places import OpenPlace, Value
from eval.search.space import Space
from merge import build_plan, parse_recipe
from merge.errors import RecipeError

FAMILY = Path(__file__).parent.parent / "recipes" / "quickstart"
FILE = str(FAMILY.parent / "open.yaml")
BODY = """\
base_model: quickstart/base
models:
  - model: quickstart/reverse
    parameters: {weight: {search: [0, 1]}, density: {search: [0.1, 1]}}
  - model: quickstart/sort
    parameters:
      weight:
        search: [0, 1]
        knots: 3
  - model: quickstart/add
    parameters: {weight: {search: [0.01, 1], log: true, filters: [mlp, self_attn]}}
parameters: {normalize: {choice: [true, false]}}
dtype: bfloat16
"""
METHODS = "merge_method: {choice: [ties, linear, task_arithmetic]}\n"


def drawn(space: Space, seed: int) -> dict[str, Value]:
    rng = random.Random(seed)

    def suggest(place: OpenPlace) -> Value:
        if place.kind == "choice":
            return rng.choice(place.choices)
        return (
            rng.randint(int(place.low), int(place.high)) if place.kind == "int" else rng.uniform(place.low, place.high)
        )

    return space.ask(suggest)


def test_places_are_found_with_names_and_lines() -> None:
    space = Space.parse(METHODS + BODY, FILE)
    assert [(place.name, place.line) for place in space.places] == [
        ("merge_method", 1),
        ("reverse.weight", 5),
        ("reverse.density", 5),
        *((f"sort.weight.{knot}", 9) for knot in range(3)),
        *((f"add.weight.{part}", 12) for part in ("mlp", "self_attn", "rest")),
        ("normalize", 13),
    ]


def test_every_choice_makes_a_plain_recipe_whose_text_says_the_same(tmp_path: Path) -> None:
    space = Space.parse(METHODS + BODY, FILE)
    seen = set()
    for seed in range(12):
        values = drawn(space, seed)
        recipe = space.recipe(values)
        again = parse_recipe(recipe.text, str(tmp_path / "elsewhere.yaml"))
        mine, theirs = build_plan(recipe), build_plan(again)
        assert mine.steps == theirs.steps
        assert "{search" not in recipe.text
        seen.add(recipe.merge_method)
    assert seen == {"ties", "linear", "task_arithmetic"}


def test_a_parameter_that_the_method_does_not_take_is_neither_asked_nor_written() -> None:
    space = Space.parse(METHODS + BODY, FILE)
    for seed in range(12):
        values = drawn(space, seed)
        recipe = space.recipe(values)
        assert ("reverse.density" in values) == (recipe.merge_method == "ties") == ("density" in recipe.text)
        assert (recipe.base_model is None) == (recipe.merge_method == "linear")  # it would be averaged in


def test_a_fixed_method_keeps_what_is_written() -> None:
    """Nothing is left out where no other method could take it: it is a problem, with its line."""
    with pytest.raises(RecipeError, match=r"open\.yaml:5: .density. is a parameter of .*, not of linear"):
        Space.parse("merge_method: linear\n" + BODY, FILE)


@pytest.mark.parametrize(
    ("place", "message"),
    [
        ("{search: [0.1, 2]}", '"density" must be between 0 and 1, not 2.0'),
        ("{search: [1, 0]}", '"search" must be two numbers, [lowest, highest], not [1, 0]'),
        ("{search: 0.5}", '"search" must be two numbers, [lowest, highest], not 0.5'),
        ("{search: [0, 1], foo: 2}", 'unknown key "foo"; known: search, int, choice, log, step, knots, filters'),
        ("{int: [0, 1.5]}", '"int" must be two whole numbers, [lowest, highest], not [0, 1.5]'),
        ("{search: [0, 1], log: true}", '"log" needs a lower end above 0'),
        ("{search: [0, 1], int: [0, 1]}", "an open place has one of search, int, choice, not search and int"),
        ("{choice: [0.5]}", '"choice" needs at least two different values, not [0.5]'),
        ("{choice: [0.5, 1], step: 1}", '"step" cannot be combined with "choice"'),
        ("{choice: [0.5, 1.5]}", '"density" must be between 0 and 1, not 1.5'),
        ("{search: [0, 1], knots: 1}", '"knots" must be a whole number from 2 to 100, not 1'),
    ],
)
def test_a_wrong_place_is_one_clear_problem_with_its_line(place: str, message: str) -> None:
    body = BODY.replace("{search: [0.1, 1]}", place)
    with pytest.raises(RecipeError) as raised:
        Space.parse("merge_method: ties\n" + body, FILE)
    assert str(raised.value) == f"{FILE}:5: {message}"


def test_problems_of_several_methods_are_reported_together() -> None:
    body = BODY.replace("dtype: bfloat16", "dtyp: bfloat16").replace("normalize:", "normalise:")
    with pytest.raises(RecipeError) as raised:
        Space.parse(METHODS + body, FILE)
    assert [problem.where for problem in raised.value.problems] == [f"{FILE}:{line}" for line in (13, 14)]


def test_an_alias_is_one_place() -> None:
    text = """\
merge_method: task_arithmetic
base_model: quickstart/base
models:
  - {model: quickstart/reverse, parameters: {weight: &w {search: [0, 1]}}}
  - {model: quickstart/sort, parameters: {weight: *w}}
"""
    space = Space.parse(text, FILE)
    assert [place.name for place in space.places] == ["reverse.weight"]
    recipe = space.recipe({"reverse.weight": 0.25})
    assert [source.parameters["weight"] for source in recipe.models] == [0.25, 0.25]


def test_a_choice_may_be_anything_and_nothing() -> None:
    text = """\
merge_method: ties
base_model: quickstart/base
models:
  - {model: {choice: [quickstart/reverse, quickstart/add]}}
  - {model: quickstart/sort}
parameters: {weight: {choice: [0.5, [0, 1], null, [{filter: mlp, value: 1}, {value: 0.2}]]}}
dtype: {choice: [bfloat16, float32]}
"""
    with pytest.raises(RecipeError, match="weight"):  # ties needs one
        Space.parse(text, FILE)
    space = Space.parse(text.replace("null, ", ""), FILE)
    model, weight, dtype = space.places
    assert weight.choices == (0.5, "[0, 1]", "[{filter: mlp, value: 1}, {value: 0.2}]")
    recipe = space.recipe({model.name: "quickstart/add", weight.name: weight.choices[1], dtype.name: "float32"})
    assert (Path(recipe.models[0].model.path).name, recipe.parameters["weight"], recipe.dtype) == ("add", (0, 1), "F32")


def test_values_are_written_short_and_stay_within_the_bounds() -> None:
    place = OpenPlace("x", "x", 1, "search", 0.12349, 0.33331)
    assert [place.rounded(value) for value in (0.12349, 0.2000049, 0.33331)] == [0.1235, 0.2, 0.3333]
    assert OpenPlace("x", "x", 1, "search", 0.12351, 1).rounded(0.12351) == 0.12351
    assert OpenPlace("x", "x", 1, "search", 1e-7, 1e-5, log=True).points(3) == pytest.approx([1e-7, 1e-6, 1e-5])


def test_points_of_a_grid_go_from_end_to_end() -> None:
    assert OpenPlace("x", "x", 1, "search", 0, 1).points(5) == [0, 0.25, 0.5, 0.75, 1]
    assert OpenPlace("x", "x", 1, "search", 0, 1, step=0.5).points(9) == [0, 0.5, 1]
    assert OpenPlace("x", "x", 1, "int", 1, 9).points(3) == [1, 5, 9]
    assert OpenPlace("x", "x", 1, "choice", choices=("a", "b")).points(9) == ["a", "b"]


def test_baselines_are_parents_average_and_the_defaults_of_each_method() -> None:
    space = Space.parse(METHODS + BODY, FILE)
    found = baselines(space, [str(FAMILY.parent / "quickstart.yaml")])
    assert [(kind, each.name) for kind, each in found] == [
        *(("parent", name) for name in ("base", "reverse", "sort", "add")),
        ("default", "uniform average"),
        *(("default", f"{method}, defaults") for method in ("ties", "linear", "task_arithmetic")),
        ("default", "quickstart"),
    ]
    ties = found[5][1]
    assert ties.values["reverse.density"] == 1.0
    assert {value for name, value in ties.values.items() if "weight" in name} == {1.0}
    assert fits(space, ties.values)
    assert not fits(Space.parse((METHODS + BODY).replace("[0.1, 1]", "[0.1, 0.9]"), FILE), ties.values)
