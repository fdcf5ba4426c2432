"""Recipes that are wrong by themselves. What the parser says of each word is in tests/test_recipe_problems.py."""

from __future__ import annotations

import os

from bad_inputs.room import LINEAR, Arguments, Room, case

TIES = """\
merge_method: ties
base_model: a
models:
  - model: b
    parameters: {weight: 0.5, density: 0.5}
"""
SLERP = """\
merge_method: slerp
base_model: a
models:
  - model: a
  - model: b
parameters: {t: 0.5}
"""


def _bytes(room: Room, data: bytes) -> Arguments:
    arguments = room.pair_and_recipe()
    (room.path / "r.yaml").write_bytes(data)
    return arguments


# --- files -------------------------------------------------------------------------------------------------------


@case("a bomb of YAML aliases", 2, "r.yaml:", "expand to more than 100,000 values")
def alias_bomb(room: Room) -> Arguments:
    lines = ["merge_method: linear", "a0: &a0 [x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 30)]
    return _bytes(room, "\n".join(lines).encode())


@case("an empty recipe", 2, "r.yaml: the recipe is empty; it needs at least merge_method and models")
def empty_recipe(room: Room) -> Arguments:
    return _bytes(room, b"")


@case("a binary file as recipe", 2, "r.yaml:1: not UTF-8 text (byte 1)")
def binary_recipe(room: Room) -> Arguments:
    return _bytes(room, bytes([1, 200, 3, 0]) * 100)


@case("control characters in a recipe", 2, "r.yaml:2: there is a control character, '\\x00'")
def control_characters(room: Room) -> Arguments:
    return _bytes(room, b"merge_method: linear\nname: \x00\n")


@case("a recipe of two megabytes", 2, "r.yaml: larger than 1 MiB")
def huge_recipe(room: Room) -> Arguments:
    return _bytes(room, b"# " + b"x" * 2_000_000)


@case("a directory as recipe", 2, "a: this is a directory; name a recipe file")
def directory_as_recipe(room: Room) -> Arguments:
    room.pair_and_recipe()
    return ["run", "a"]


@case("a recipe that is not there", 2, 'rr.yaml: there is no such recipe file; did you mean "r.yaml"?')
def no_such_recipe(room: Room) -> Arguments:
    room.pair_and_recipe()
    return ["run", "rr.yaml"]


@case("a recipe name of 300 letters", 2, "there is no such recipe file")
def endless_recipe_name(room: Room) -> Arguments:
    return ["run", "x" * 300]


@case("a recipe that is a named pipe", 2, "r.yaml: there is no such recipe file")
def pipe_as_recipe(room: Room) -> Arguments:
    os.mkfifo(room.path / "r.yaml")
    return ["run", "r.yaml"]


@case("YAML that does not parse", 2, "r.yaml:3: not valid YAML")
def broken_yaml(room: Room) -> Arguments:
    return _bytes(room, b"merge_method: linear\nmodels: [\n")


@case("a YAML tag that asks for code", 2, "r.yaml:1: the YAML tag", "is not allowed")
def yaml_tag(room: Room) -> Arguments:
    return _bytes(room, b"merge_method: !!python/object/apply:os.mkdir [the-code-was-run]\n")


@case("a list as recipe", 2, "r.yaml:1: the recipe is not a mapping of keys to values")
def list_as_recipe(room: Room) -> Arguments:
    return _bytes(room, b"- a\n- b\n")


@case("two documents of which the first has no name", 2, 'r.yaml:1: this document needs a "name"')
def two_documents(room: Room) -> Arguments:
    return room.pair_and_recipe(LINEAR + "---\n" + LINEAR)


@case("a mixture without experts", 2, 'r.yaml:1: a mixture needs "experts", a list of {source_model, positive_prompts}')
def mixture(room: Room) -> Arguments:
    return room.pair_and_recipe("experts: []\nbase_model: a\n")


@case("experts without prompts for the router", 2, 'r.yaml:3: gate_mode "hidden" needs "positive_prompts"', "r.yaml:4:")
def mixture_without_prompts(room: Room) -> Arguments:
    return room.pair_and_recipe("base_model: a\nexperts:\n- source_model: a\n- source_model: b\n")


# --- words -------------------------------------------------------------------------------------------------------


@case("an unknown method", 2, 'r.yaml:1: unknown method "tise"; did you mean "ties"?', "`merge methods`")
def unknown_method(room: Room) -> Arguments:
    return room.pair_and_recipe(TIES.replace("ties", "tise"))


@case("a misspelt parameter", 2, 'r.yaml:5: unknown key "denstiy"; did you mean "density"?')
def misspelt_parameter(room: Room) -> Arguments:
    return room.pair_and_recipe(TIES.replace("density", "denstiy"))


@case(
    "a parameter of another method",
    2,
    'r.yaml:4: "density" is a parameter of',
    "not of linear, which has: weight, normalize",
)
def foreign_parameter(room: Room) -> Arguments:
    return room.pair_and_recipe(LINEAR.replace("weight: 0.5", "density: 1, weight: 0.5", 1))


@case("an unknown key", 2, 'r.yaml:7: unknown key "modles"; did you mean "models"?')
def unknown_key(room: Room) -> Arguments:
    return room.pair_and_recipe(LINEAR + "modles: []\n")


@case("a key given twice", 2, 'r.yaml:7: key "merge_method" is given twice', "first on line 1")
def key_twice(room: Room) -> Arguments:
    return room.pair_and_recipe(LINEAR + "merge_method: slerp\n")


@case("a list where a mapping belongs", 2, "r.yaml:2:", "must be a mapping of keys to values, not a list")
def wrong_type(room: Room) -> Arguments:
    return room.pair_and_recipe("merge_method: linear\nparameters: [1]\nmodels: [{model: a}]\n")


@case("a word where a number belongs", 2, 'r.yaml:4: "weight" must be a number, not "half"')
def word_for_number(room: Room) -> Arguments:
    return room.pair_and_recipe(LINEAR.replace("0.5", "half", 1))


@case("a weight that is NaN", 2, 'r.yaml:4: "weight" must be a finite number, not .nan')
def nan_weight(room: Room) -> Arguments:
    return room.pair_and_recipe(LINEAR.replace("0.5", ".nan", 1))


@case("an unknown dtype", 2, 'r.yaml:7: unknown dtype "bfloat"; did you mean "bfloat16"?')
def unknown_dtype_word(room: Room) -> Arguments:
    return room.pair_and_recipe(LINEAR + "dtype: bfloat\n")


@case("an unknown leniency", 2, 'r.yaml:7: unknown leniency "nan" in "allow"')
def unknown_leniency(room: Room) -> Arguments:
    return room.pair_and_recipe(LINEAR + "allow: [nan]\n")


@case("a seed that is too large", 2, 'r.yaml:7: "seed" must be')
def huge_seed(room: Room) -> Arguments:
    return room.pair_and_recipe(LINEAR + f"seed: {1 << 64}\n")


@case("several mistakes at once", 2, "r.yaml:4: ", "r.yaml:7: ", "r.yaml:8: ")
def several_mistakes(room: Room) -> Arguments:
    return room.pair_and_recipe(LINEAR.replace("weight: 0.5", "wieght: 0.5", 1) + "dtype: bfloat\nmodles: []\n")


@case("a model directory that is not there", 2, 'r.yaml:3: there is no directory "./c"')
def no_such_model(room: Room) -> Arguments:
    return room.pair_and_recipe(LINEAR.replace("model: a", "model: ./c"))


@case(
    "a weight file in place of its directory", 2, 'r.yaml:3: "a/model.safetensors" is a file; name the model directory'
)
def file_as_model(room: Room) -> Arguments:
    return room.pair_and_recipe(LINEAR.replace("model: a", "model: a/model.safetensors"))


@case("a whole model in an adapter's place", 1, "b: is not an adapter: it has no adapter_config.json")
def model_as_adapter(room: Room) -> Arguments:
    return room.pair_and_recipe(LINEAR.replace("model: a", "model: a+b"))


@case("the union of tokenizers without a vocabulary", 1, "a/tokenizer.json: model.vocab: expected tokens")
def tokenizer_union(room: Room) -> Arguments:
    return room.pair_and_recipe(LINEAR + "tokenizer_source: union\n")


# --- sense -------------------------------------------------------------------------------------------------------


@case("a weight that is missing", 2, 'r.yaml:3: linear needs the parameter "weight" for model "a"')
def missing_weight(room: Room) -> Arguments:
    return room.pair_and_recipe(LINEAR.replace("    parameters: {weight: 0.5}\n", "", 1))


@case(
    "a weight whose filters match nothing",
    2,
    "r.yaml",
    '"weight" of a has no value for',
    "and 18 more",
    "Add a value without a filter",
)
def filters_match_nothing(room: Room) -> Arguments:
    return room.pair_and_recipe(LINEAR.replace("weight: 0.5", "weight: [{filter: nothing, value: 1}]", 1))


@case("a density above 1 in a gradient", 2, 'r.yaml:5: "density" must be between 0 and 1, not 1.5')
def density_out_of_range(room: Room) -> Arguments:
    return room.pair_and_recipe(TIES.replace("density: 0.5", "density: [0.2, 1.5]"))


@case("trim: model with a density that varies", 2, '"trim: model" needs one density for a model; b has')
def model_trim_with_gradient(room: Room) -> Arguments:
    return room.pair_and_recipe(TIES.replace("density: 0.5", "density: [0.2, 0.8]") + "parameters: {trim: model}\n")


@case("slerp of three models", 2, "r.yaml:3:", "slerp merges exactly 2 models, and 3 are listed")
def slerp_of_three(room: Room) -> Arguments:
    room.model("c")
    return room.pair_and_recipe(SLERP.replace("  - model: b\n", "  - model: b\n  - model: c\n"))


@case(
    "slerp with a base that is not listed",
    2,
    "slerp merges exactly 2 models, and 3 are listed",
    'base_model "a", which must be one of them',
)
def slerp_base_not_listed(room: Room) -> Arguments:
    room.model("c")
    return room.pair_and_recipe(SLERP.replace("  - model: a\n", "  - model: c\n"))


@case("ties without a base", 2, 'r.yaml:1: ties needs "base_model", the model the others were fine-tuned from')
def no_base(room: Room) -> Arguments:
    return room.pair_and_recipe(TIES.replace("base_model: a\n", ""))


@case("linear weights that sum to zero", 2, 'r.yaml:2: "models": the weights [0.5, -0.5] sum to zero')
def weights_sum_to_zero(room: Room) -> Arguments:
    return room.pair_and_recipe(
        LINEAR.replace("model: b\n    parameters: {weight: 0.5}", "model: b\n    parameters: {weight: -0.5}")
    )


@case("linear weights that sum to zero in one layer", 2, "model.layers.1.", "the weights [-0.5, 0.5] sum to zero")
def weights_sum_to_zero_in_a_layer(room: Room) -> Arguments:
    return room.pair_and_recipe(LINEAR.replace("weight: 0.5", "weight: [1, -0.5]", 1))


@case("models and slices in one recipe", 2, '"models" and "slices" are both given; a recipe has one of them')
def models_and_slices(room: Room) -> Arguments:
    return room.pair_and_recipe(
        LINEAR + "slices: [{sources: [{model: a, layer_range: [0, 1], parameters: {weight: 1}}]}]\n"
    )


@case(
    "sources of a slice with unequal lengths",
    2,
    "r.yaml:",
    "slice 1: its sources have different numbers of layers: 2 and 1",
)
def unequal_slices(room: Room) -> Arguments:
    sources = ", ".join(
        f"{{model: {m}, layer_range: [0, {n}], parameters: {{weight: 1}}}}" for m, n in (("a", 2), ("b", 1))
    )
    return room.pair_and_recipe(f"merge_method: linear\nslices:\n  - sources: [{sources}]\n")


@case("a stack of layer ranges that are all empty", 2, 'no slice holds a layer: "layer_range" is [2, 2]')
def empty_range(room: Room) -> Arguments:
    return room.pair_and_recipe("merge_method: passthrough\nslices:\n  - sources: [{model: a, layer_range: [2, 2]}]\n")


@case("a recipe without models", 2, "the recipe has no models")
def no_models(room: Room) -> Arguments:
    return room.pair_and_recipe("merge_method: linear\n")


@case("plan of a bad recipe, as JSON", 2, '"where": "r.yaml:4"', '"message": "unknown key', on_stdout=True)
def plan_as_json(room: Room) -> Arguments:
    room.pair_and_recipe(LINEAR.replace("weight", "wieght", 1))
    return ["plan", "r.yaml", "--json"]
