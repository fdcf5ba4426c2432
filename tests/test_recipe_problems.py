"""Every way a recipe can be wrong, and the words it gets."""

from __future__ import annotations

import contextlib
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from merge.errors import RecipeError
from merge.planning.load import load_recipe, parse_pipeline, parse_recipe

PART = "{model: a/b, layer_range: [0, 2]}"
TWO = (
    "merge_method: linear\nmodels:\n- {model: a/b, parameters: {weight: 1}}\n- {model: a/c, parameters: {weight: 1}}\n"
)
TIES = "merge_method: ties\nbase_model: a/x\nmodels:\n- {model: a/b, parameters: {weight: 1}}\n"
SLERP = "merge_method: slerp\nbase_model: a/b\nmodels: [{model: a/b}, {model: a/c}]\nparameters: {t: 0.5}\n"


def problems(text: str) -> list[str]:
    with pytest.raises(RecipeError) as raised:
        parse_recipe(text, "r.yaml")
    assert raised.value.exit_code == 2
    found = [str(problem) for problem in raised.value.problems]
    assert str(raised.value).split("\n") == [*found, *raised.value.advice]
    return found


def stack(*sources: str, more: str = "") -> str:
    lines = "".join(f"- sources: [{source}]\n" for source in sources)
    return f"merge_method: passthrough\nslices:\n{lines}{more}"


def test_an_open_place_is_for_merge_search() -> None:
    text = "merge_method: linear\nmodels:\n- model: a\n  parameters: {weight: {search: [0, 1]}}\n"
    with pytest.raises(RecipeError) as caught:
        parse_recipe(text, "r.yaml")
    assert 'r.yaml:4: "weight" is open here; write a value, or let `merge search` find one' in str(caught.value)
    assert "unknown key" not in str(caught.value)


def test_everything_is_reported_at_once_in_the_recipe_s_order() -> None:
    text = """\
models:
  - model: a/b
    parameters: {wieght: 1, normalize: true, denstiy: 0.3}
  - model: a/c
    weight: 1
  - model: a/c+a/lora
    layer_range: [0, 3]
merge_method: ties
parameters: {rescale: l2}
dtype: bfloat
modles: 3
"""
    misplaced = '"normalize" is one value for all models of ties and has no effect under a single model; '
    assert problems(text) == [
        'r.yaml:3: unknown key "wieght"; did you mean "weight"?',
        f'r.yaml:3: {misplaced}move it to "parameters" of the recipe or of the slice',
        'r.yaml:3: unknown key "denstiy"; did you mean "density"?',
        'r.yaml:5: unknown key "weight"; it is a parameter of ties: write it under "parameters"',
        'r.yaml:6: ties needs the parameter "weight" for model "a/c+a/lora"',
        'r.yaml:7: unknown key "layer_range"; it belongs to an entry of "sources"',
        'r.yaml:8: ties needs "base_model", the model the others were fine-tuned from',
        'r.yaml:9: "rescale" must be false, true or "l1", not "l2"',
        'r.yaml:10: unknown dtype "bfloat"; did you mean "bfloat16"?',
        'r.yaml:11: unknown key "modles"; did you mean "models"?',
    ]


BAD_YAML = [
    ("", "r.yaml: the recipe is empty; it needs at least merge_method and models"),
    ("# only this\n", "r.yaml: the recipe is empty; it needs at least merge_method and models"),
    ("hello", "r.yaml:1: the recipe is not a mapping of keys to values;"),
    ("\n- a\n", "r.yaml:2: the recipe is not a mapping of keys to values;"),
    ("a:\n\tb: 1", "r.yaml:2: not valid YAML:"),
    ("a: 1\nb: [1, 2\nc: 3", "r.yaml:3: not valid YAML:"),
    ("a: *x", "r.yaml:1: not valid YAML:"),
    ("a: 1\nb: \x07", "r.yaml:2: there is a control character, '\\x07', here;"),
    ("a: \ud800", "r.yaml:1: there is a control character,"),
    (
        "a: !!python/object/apply:os.system [x]",
        'r.yaml:1: the YAML tag "tag:yaml.org,2002:python/object/apply:os.system"',
    ),
    ("a: &a [*a]", "r.yaml:1: the aliases here refer to themselves or expand to more than 100,000 values"),
    ("a: &a {<<: *a}", "r.yaml:1: the aliases here refer to themselves or expand to more than 100,000 values"),
    ("a: " + "[" * 200_000, "r.yaml:1: the recipe nests deeper than 64 levels"),
    ("- " * 200_000, "r.yaml:1: the recipe nests deeper than 64 levels"),
    ("a: " + "x" * (1 << 20), "r.yaml: larger than 1 MiB;"),
    (TWO + "---\na: 1", "r.yaml:5: a second document starts here: this is a pipeline; read it with load_pipeline"),
]


@pytest.mark.parametrize(("text", "start"), BAD_YAML, ids=range(len(BAD_YAML)))
def test_what_is_not_a_recipe_gets_one_clear_problem(text: str, start: str) -> None:
    (found,) = problems(text)
    assert found.startswith(start)


def test_tabs_and_lone_stars_get_a_remedy() -> None:
    assert problems("a:\n\tb: 1")[0].endswith("Indent with spaces; YAML does not allow tabs there.")
    assert problems("a: [{filter: *, value: 1}]")[0].endswith('Quote a lone star: "*".')


def test_an_alias_bomb_is_refused() -> None:
    levels = "".join(
        f"{new}: &{new} [{', '.join([f'*{old}'] * 9)}]\n" for old, new in zip("abcdefgh", "bcdefghi", strict=True)
    )
    (found,) = problems("a: &a [1, 1, 1, 1, 1, 1, 1, 1, 1]\n" + levels)
    assert "expand to more than 100,000 values" in found


def test_after_a_thousand_problems_reading_ends() -> None:
    """Each problem looks for the nearest known key: 20,000 of them took 23 seconds."""
    found = problems(TWO + "".join(f"densitu{i}: 1\n" for i in range(20_000)))
    assert len(found) == 1001
    assert found[-1] == "r.yaml:1005: more than 1,000 problems; the rest of the file was not read"


def test_many_values_and_documents_are_refused() -> None:
    assert problems("a: [" + "1," * 100_000 + "]") == ["r.yaml:1: the recipe holds more than 100,000 values"]
    with pytest.raises(RecipeError, match=r"^line 202: the recipe holds more than 100 documents$"):
        parse_pipeline("---\na: 1\n" * 200)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"a: 1\nb: \xff\xfe", "2: not UTF-8 text (byte 8); a recipe is a YAML file"),
        (b"\x93NUMPY\x01\x00", "1: not UTF-8 text (byte 0); a recipe is a YAML file"),
        (b"x" * (3 << 20), " larger than 1 MiB; a recipe is a short YAML file"),
    ],
)
def test_binary_and_huge_files_are_refused(tmp_path: Path, data: bytes, message: str) -> None:
    (tmp_path / "r.yaml").write_bytes(data)
    with pytest.raises(RecipeError) as raised:
        load_recipe(tmp_path / "r.yaml")
    assert str(raised.value) == f"{tmp_path}/r.yaml:{message}"


def test_without_a_file_the_line_is_named() -> None:
    with pytest.raises(RecipeError, match=r"^line 5: unknown key"):
        parse_recipe(TWO + "dtpye: float16")


@given(st.text(st.sampled_from("abmodels:&*[]{}-<!|>'\"#\n\t 01"), max_size=60))
def test_no_text_ends_in_anything_but_a_recipe_error(text: str) -> None:
    with pytest.raises(RecipeError):
        parse_recipe(text)


@given(st.sampled_from(TWO + TIES + SLERP), st.integers(0, 200), st.text(max_size=3))
def test_no_damage_to_a_recipe_ends_in_a_traceback(gone: str, at: int, put: str) -> None:
    for text in (TWO, TIES, SLERP, stack(PART)):
        damaged = text[:at].replace(gone, "", 1) + put + text[at:]
        with contextlib.suppress(RecipeError):
            parse_recipe(damaged)


KEYS = [
    (TWO + "denstiy: 1", 'r.yaml:5: unknown key "denstiy"; known: merge_method,'),
    (TWO + "weight: 1", 'r.yaml:5: unknown key "weight"; it is a parameter of linear: write it under "parameters"'),
    (TWO + "layer_range: [0, 1]", 'r.yaml:5: unknown key "layer_range"; it belongs to an entry of "sources"'),
    (TWO + "dtype: float16\ndtype: float32", 'r.yaml:6: key "dtype" is given twice in the recipe; first on line 5'),
    (TWO + "? [a]\n: 1", "r.yaml:5: a key must be a word, not a list"),
    (TIES + "parameters: {t: 1}", 'r.yaml:5: "t" is a parameter of nearswap, slerp, not of ties, which has: weight,'),
    (
        TIES + "parameters: {dtype: x}",
        'r.yaml:5: unknown key "dtype"; it belongs to the recipe, not under "parameters"',
    ),
    (TIES + "parameters: {zzz: 1}", 'r.yaml:5: unknown key "zzz"; known: weight, density, normalize, lambda,'),
    (TIES.replace("weight: 1", "weight: 1, lamda: 1"), 'r.yaml:4: unknown key "lamda"; did you mean "lambda"?'),
    (SLERP.replace("{t: 0.5}", "{t: {filtre: a, value: 1}}"), 'r.yaml:4: unknown key "filtre"; did you mean "filt'),
    (
        stack("{model: a/b, layer_rnge: [0, 2], layer_range: [0, 2]}"),
        'r.yaml:3: unknown key "layer_rnge"; did you mean',
    ),
    ("{}", 'r.yaml:1: "merge_method" is missing, for example "linear" or "ties"; `merge m'),
    (TWO.replace("linear", "lineer"), 'r.yaml:1: unknown method "lineer"; did you mean "linear"? `merge methods` li'),
    (TWO.replace("linear", "slerpe"), 'r.yaml:1: unknown method "slerpe"; did you mean "slerp"? `merge methods` list'),
    (TWO.replace("linear", "dare"), 'r.yaml:1: unknown method "dare"; did you mean "dare_linear" or "dare_ties"? `m'),
    (TWO.replace("linear", "qqqq"), 'r.yaml:1: unknown method "qqqq"; `merge methods` lists them all'),
    (
        SLERP.replace("{t: 0.5}", "{t: 0.5, weight: 1}"),
        'r.yaml:4: "weight" is a parameter of nuslerp, multislerp, linear and',
    ),
    (TWO + "allow: [overfow]", 'r.yaml:5: unknown leniency "overfow" in "allow"; did you mean "overflow"?'),
]
TYPES = [
    ("merge_method: linear\nmodels: a/b", 'r.yaml:2: "models" must be a list, not "a/b"'),
    (
        "merge_method: linear\nmodels: [a/b]",
        'r.yaml:2: an entry of "models" must be a mapping, not "a/b"; write "- model',
    ),
    (
        "merge_method: linear\nmodels: [[a]]",
        'r.yaml:2: an entry of "models" must be a mapping of keys to values, not a l',
    ),
    (
        "merge_method: linear\nmodels: [{parameters: {weight: 1}}]",
        'r.yaml:2: an entry of "models" needs the key "model"',
    ),
    ("merge_method: 3\nmodels: [{model: a/b}]", 'r.yaml:1: "merge_method" must be a string, not 3; quote it: "3"'),
    (TWO + "parameters: 3", 'r.yaml:5: "parameters" must be a mapping of keys to values, not 3'),
    (TWO + "dtype: [float16]", 'r.yaml:5: "dtype" must be a string, not a list'),
    (TWO + "dtype: int8", 'r.yaml:5: unknown dtype "int8"; known: float64, float32, float16, bfloat16,'),
    (TWO + "seed: -1", 'r.yaml:5: "seed" must be a whole number from 0 to 18446744073709551615, not -1'),
    (TWO + "seed: 1.5", 'r.yaml:5: "seed" must be a whole number from 0 to 18446744073709551615, not 1.5'),
    (TWO + "seed: true", 'r.yaml:5: "seed" must be a whole number from 0 to 18446744073709551615, not true'),
    (TWO + "name: ../x", 'r.yaml:5: "name" must be usable as the name of a directory, not "../x"'),
    (TWO + "allow: overflow", 'r.yaml:5: "allow" must be a list, for example [missing_tensors], not "overflow"'),
    (TWO.replace("weight: 1", "weight: high", 1), 'r.yaml:3: "weight" must be a number, not "high"'),
    (TWO.replace("weight: 1", "weight: ", 1), 'r.yaml:3: "weight" must be a number, not nothing'),
    (TWO.replace("weight: 1", "weight: true", 1), 'r.yaml:3: "weight" must be a number, not true'),
    (TWO.replace("weight: 1", "weight: .nan", 1), 'r.yaml:3: "weight" must be a finite number, not .nan'),
    (TWO.replace("weight: 1", "weight: -.inf", 1), 'r.yaml:3: "weight" must be a finite number, not -.inf'),
    (TWO.replace("weight: 1", "weight: 1e999", 1), 'r.yaml:3: "weight" must be a finite number, not "1e999"'),
    (TWO.replace("weight: 1", f"weight: {'1' * 5000}", 1), 'r.yaml:3: "weight" must be a finite number, not 1111'),
    (TWO.replace("weight: 1", f"weight: 1{':1' * 300_000}", 1), 'r.yaml:3: "weight" must be a finite number, not 1:1'),
    (
        TWO.replace("weight: 1", f"weight: 1{':1' * 300_000}.5", 1),
        'r.yaml:3: "weight" must be a finite number, not 1:1',
    ),
    (TWO.replace("weight: 1", f"weight: 1{':5' * 190}.5", 1), 'r.yaml:3: "weight" must be a finite number, not 1:5:5'),
    (TWO.replace("weight: 1", "weight: !!float abc", 1), 'r.yaml:3: "weight" must be a number, not abc'),
    (TWO.replace("weight: 1", "weight: !!float 0xFF", 1), 'r.yaml:3: "weight" must be a number, not 0xFF'),
    (TWO.replace("weight: 1", "weight: !!float ''", 1), 'r.yaml:3: "weight" must be a number, not ""'),
    (TWO.replace("weight: 1", "weight: !!int ''", 1), 'r.yaml:3: "weight" must be a number, not ""'),
    (TWO + "seed: !!int ''", 'r.yaml:5: "seed" must be a whole number from 0 to 18446744073709551615, not ""'),
    (TWO + f"{'k' * 301}: 1", "r.yaml:5: a key has at most 300 characters, not kkkk"),
    (TWO.replace("model: a", f"model: {'a' * 70_000}"), 'r.yaml:3: "aaaa'),
    (TWO.replace("weight: 1", "weight: []", 1), 'r.yaml:3: "weight" is an empty list; a gradient needs at least one'),
    (TWO.replace("weight: 1", "weight: [[1]]", 1), 'r.yaml:3: "weight" must be one value or one flat list of values'),
    (
        TWO.replace("weight: 1", "weight: [1, {value: 1}]", 1),
        'r.yaml:3: "weight" must be a list of values or a list of',
    ),
    (TWO.replace("weight: 1", "weight: {filter: a}", 1), 'r.yaml:3: a condition of "weight" needs the key "value"'),
    (
        TWO.replace("weight: 1", "weight: {filter: 1, value: 1}", 1),
        "r.yaml:3: a filter must be a string, a part of a ten",
    ),
    (TWO.replace("weight: 1", "weight: {value: {value: 1}}", 1), 'r.yaml:3: "weight" must be one value or one flat'),
    (TWO + "parameters: {normalize: 2}", 'r.yaml:5: "normalize" must be true or false, not 2'),
    (
        TIES + "parameters: {trim: Modell}",
        'r.yaml:5: "trim" must be "tensor" or "model", not "Modell"; did you mean "mod',
    ),
    (TIES + "parameters: {density: 1.5}", 'r.yaml:5: "density" must be between 0 and 1, not 1.5'),
    (TIES + "parameters: {density: [0.5,\n -1]}", 'r.yaml:6: "density" must be between 0 and 1, not -1'),
    (TIES + "parameters: {density: [{value: [0, 2]}]}", 'r.yaml:5: "density" must be between 0 and 1, not 2'),
]
RANGES = [
    (stack("{model: a/b, layer_range: [0, 0]}"), 'no slice holds a layer: "layer_range" is [0, 0]'),
    (stack("{model: a/b, layer_range: [3, 1]}"), '"layer_range" [3, 1] ends before it begins; write [first, end)'),
    (stack("{model: a/b, layer_range: [-1, 3]}"), '"layer_range" [-1, 3] begins below 0'),
    (stack("{model: a/b, layer_range: [1]}"), '"layer_range" must be two whole numbers, [first, end), not [1]'),
    (
        stack("{model: a/b, layer_range: [1, 2.5]}"),
        '"layer_range" must be two whole numbers, [first, end), not [1, 2.5]',
    ),
    (stack("{model: a/b, layer_range: 3}"), '"layer_range" must be two whole numbers, [first, end), not 3'),
    (stack("{model: a/b}"), 'an entry of "sources" needs the key "layer_range", for example [0, 24]'),
    (stack(""), 'an entry of "slices" needs "sources", a list of {model, layer_range}'),
]
MODELS = [
    ("merge_method: linear", 'r.yaml:1: the recipe has no models: list them under "models", or layers of them under'),
    ("merge_method: linear\nmodels: []", "r.yaml:2: the recipe has no models:"),
    (TWO + stack(PART)[26:], 'r.yaml:5: "models" and "slices" are both given;'),
    (SLERP.replace("base_model: a/b\n", ""), 'r.yaml:1: slerp needs "base_model", the model at the t = 0 end'),
    (
        SLERP.replace("base_model: a/b", "base_model: a/x"),
        'r.yaml:3: "models": slerp merges exactly 2 models, and 3 are',
    ),
    (
        "merge_method: linear\nmodels:\n" + "".join(f"  - {{model: a/m{i}}}\n" for i in range(501)),
        'r.yaml:2: "models": linear merges at most 500 models, and 501 are listed',
    ),
    (SLERP.replace("a/c", "a/b"), 'r.yaml:3: "models": base_model "a/b" is listed 2 times; list it once'),
    (SLERP.replace("{t: 0.5}", ""), 'r.yaml:4: slerp needs the parameter "t": write it under "parameters"'),
    (TIES.replace("a/b", "a/x"), 'r.yaml:3: "models": ties merges at least 1 model besides the base, and 0 are li'),
    (TIES.replace("weight: 1", ""), 'r.yaml:4: ties needs the parameter "weight" for model "a/b"'),
    (
        "merge_method: passthrough\nmodels: [{model: a/b}, {model: a/c}]",
        'r.yaml:2: "models": passthrough merges exactly 1',
    ),
    ("merge_method: passthrough\nbase_model: a/c\nmodels: [{model: a/b}]", "r.yaml:2: passthrough has no base mod"),
    (
        TWO + "base_model: a/x",
        'r.yaml:5: linear needs the parameter "weight" for model "a/x": base_model is an input of',
    ),
    (
        TWO.replace("weight: 1", "weight: -1", 1),
        'r.yaml:2: "models": the weights [-1.0, 1.0] sum to zero, and normalize divides by the sum.',
    ),
    (
        stack(PART, more="base_model: a/x\nparameters: {weight: 1}").replace("passthrough", "ties"),
        'r.yaml:3: slice 1: ties needs its base_model "a/x" among the sources',
    ),
    (
        stack(PART, PART, more="base_model: a/x\nparameters: {weight: 1}").replace("passthrough", "nuslerp"),
        'r.yaml:3: slice 1: nuslerp needs its base_model "a/x" among the sources',
    ),
    (
        TWO.replace("linear", "nuslerp") + "base_model: a/b",
        'r.yaml:2: "models": nuslerp merges exactly 2 models besides the base, and 1 is listed',
    ),
    (
        TWO.replace("linear", "nuslerp").replace("- {model: a/c, parameters: {weight: 1}}\n", ""),
        'r.yaml:2: "models": nuslerp merges exactly 2 models, and 1 is listed',
    ),
    (
        "merge_method: linear\nparameters: {weight: 1}\nslices:\n"
        "- sources: [{model: a/b, layer_range: [0, 2]}, {model: a/c, layer_range: [0, 3]}]",
        "r.yaml:4: slice 1: its sources have different numbers of layers: 2 and 3",
    ),
]


@pytest.mark.parametrize(("text", "start"), [*KEYS, *TYPES, *MODELS])
def test_a_wrong_key_value_or_model_is_named_with_its_place(text: str, start: str) -> None:
    assert [found for found in problems(text) if found.startswith(start)], problems(text)


@pytest.mark.parametrize(("text", "message"), RANGES)
def test_a_malformed_layer_range_is_one_problem(text: str, message: str) -> None:
    (found,) = problems(text)
    assert found.startswith(f"r.yaml:3: {message}")
