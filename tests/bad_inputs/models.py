"""Models that do not fit each other, and numbers that do not fit their dtype."""

from __future__ import annotations

from typing import Any

import numpy as np

from bad_inputs.room import LINEAR, TASK, Arguments, Room, Tensors, case, edit_header

Q = "model.layers.0.self_attn.q_proj.weight"
EMBEDDING = "model.embed_tokens.weight"


def put(name: str, values: Any, dtype: str = "float32") -> Any:
    """For Room.model's edit: one tensor more, or another one of that name."""
    array = np.asarray(values, dtype if dtype in np.sctypeDict else None)
    return lambda tensors: tensors.__setitem__(name, (array, dtype))


def spoil(value: float, count: int = 3) -> Any:
    """Puts `value` into the first elements of one tensor."""

    def edit(tensors: Tensors) -> None:
        tensors[Q][0].reshape(-1)[:count] = value

    return edit


def _with_b(room: Room, text: str = LINEAR, **b: Any) -> Arguments:
    room.model("a", seed=1)
    room.model("b", **{"seed": 2, "like": 1} | b)
    return room.recipe(text)


# --- numbers -----------------------------------------------------------------------------------------------------


@case("NaN in the weights", 1, f"{Q}: NaN or infinite values in the input: 3 in b", 'Set "allow: [nonfinite]"')
def nan_weights(room: Room) -> Arguments:
    return _with_b(room, edit=spoil(float("nan")))


@case("NaN in the weights, allowed", 0, "allowed by the recipe: 3 non-finite values, 0 overflows")
def nan_weights_allowed(room: Room) -> Arguments:
    return _with_b(room, LINEAR + "allow: [nonfinite]\n", edit=spoil(float("nan")))


@case("infinity in the weights", 1, f"{Q}: NaN or infinite values in the input: 1 in b")
def infinite_weights(room: Room) -> Arguments:
    return _with_b(room, edit=spoil(float("inf"), 1))


@case("infinity in the weights, allowed", 0, "allowed by the recipe: 1 non-finite values, 0 overflows")
def infinite_weights_allowed(room: Room) -> Arguments:
    return _with_b(room, TASK + "allow: [nonfinite]\n", edit=spoil(float("inf"), 1))


@case("1e5 into float16", 1, f"{Q}: 3 values (largest 100000) do not fit F16", 'set "allow: [overflow]"')
def float16_overflow(room: Room) -> Arguments:
    return _with_b(room, LINEAR + "out_dtype: float16\n", edit=spoil(2e5))


@case("1e5 into float16, allowed", 0, "allowed by the recipe: 0 non-finite values, 3 overflows")
def float16_overflow_allowed(room: Room) -> Arguments:
    return _with_b(room, LINEAR + "out_dtype: float16\nallow: [overflow]\n", edit=spoil(2e5))


@case("3.4e38 into bfloat16", 1, f"{Q}: 1 values (largest 3.4e+38) do not fit BF16")
def bfloat16_overflow(room: Room) -> Arguments:
    text = LINEAR.replace("weight: 0.5", "weight: 1") + "parameters: {normalize: false}\ndtype: bfloat16\n"
    return _with_b(room, text, edit=spoil(3.4e38, 1))


@case("1000 into float8", 1, f"{Q}: 2 values (largest 1000) do not fit F8_E4M3")
def float8_overflow(room: Room) -> Arguments:
    text = LINEAR.replace("model: b\n    parameters: {weight: 0.5}", "model: b\n    parameters: {weight: 0}")
    room.model("a", seed=1, edit=spoil(1000, 2))
    room.model("b", seed=2, like=1)
    return room.recipe(text + "out_dtype: float8_e4m3fn\n")


@case("1e300 in a float64 tensor, into float32", 1, "wide.weight: 2 values (largest 1e+300) do not fit F32")
def float64_overflow(room: Room) -> Arguments:
    room.pair(edit=put("wide.weight", [1e300, 1e300], "float64"))
    return room.recipe(LINEAR + "out_dtype: float32\n")


@case("1e300 in a float64 tensor, as float64", 0, "22 tensors")
def huge_float64(room: Room) -> Arguments:
    room.pair(edit=put("wide.weight", [1e300, 1e300], "float64"))
    return room.recipe()


@case(
    "weights so large that the sum is infinite",
    1,
    "gives",
    "NaN or infinite values from finite inputs",
    "Look at its weights",
)
def weights_overflow(room: Room) -> Arguments:
    text = LINEAR.replace("weight: 0.5", "weight: 3.0e+38")
    return room.pair_and_recipe(text + "parameters: {normalize: false}\n")


@case("a weight that float32 does not hold", 1, "NaN or infinite values from finite inputs")
def weight_beyond_float32(room: Room) -> Arguments:
    return room.pair_and_recipe(TASK.replace("weight: 0.5", "weight: 1.0e+300"))


# --- shapes, names, kinds ----------------------------------------------------------------------------------------


@case(
    "vocabularies of different size",
    2,
    f"{EMBEDDING}: shapes differ: a [32, 8], b [40, 8]",
    "vocabularies differ in size",
    "shape_mismatch",
)
def vocabularies_differ(room: Room) -> Arguments:
    return _with_b(room, edit=put(EMBEDDING, np.ones((40, 8))))


@case("shapes that differ", 2, f"{Q}: shapes differ: a [8, 8], b [4, 8]", 'Set "allow: [shape_mismatch]"')
def shapes_differ(room: Room) -> Arguments:
    return _with_b(room, edit=put(Q, np.ones((4, 8))))


@case("shapes that differ, allowed", 0, "21 tensors", "1 tensor(s) of different shapes, copied from the first")
def shapes_differ_allowed(room: Room) -> Arguments:
    return _with_b(room, LINEAR + "allow: [shape_mismatch]\n", edit=put(Q, np.ones((4, 8))))


@case(
    "a model of another width: every tensor differs",
    2,
    "r.yaml:5: b and a differ in size: hidden_size 16 and 8, intermediate_size 32 and 16. They cannot be merged",
)
def another_width(room: Room) -> Arguments:
    room.model("a", seed=1)
    room.model("b", seed=2, hidden=16)
    return room.recipe()


@case(
    "models with no tensor in common",
    2,
    "r.yaml:5: b (llama) and a (llama) are not of one architecture: 21 tensors of b (t0 ...) are not in",
)
def nothing_in_common(room: Room) -> Arguments:
    def rename(tensors: Tensors) -> None:
        for number, name in enumerate(list(tensors)):
            tensors[f"t{number}"] = tensors.pop(name)

    return _with_b(room, edit=rename)


@case("a tensor that one model lacks", 2, f"{Q}: missing from b; found in a", 'Set "allow: [missing_tensors]"')
def missing_tensor(room: Room) -> Arguments:
    return _with_b(room, edit=lambda tensors: tensors.pop(Q))


@case("a tensor that one model lacks, allowed", 0, "21 tensors", "1 tensor(s) missing from some inputs")
def missing_tensor_allowed(room: Room) -> Arguments:
    return _with_b(room, LINEAR + "allow: [missing_tensors]\n", edit=lambda tensors: tensors.pop(Q))


@case("a tensor that the base lacks, allowed", 0, "21 tensors", "1 tensor(s) missing from some inputs")
def missing_in_base_allowed(room: Room) -> Arguments:
    room.model("a", seed=1, edit=lambda tensors: tensors.pop(Q))
    room.model("b", seed=2, like=1)
    return room.recipe(TASK + "allow: [missing_tensors]\n")


@case(
    "an integer tensor with other values",
    1,
    "position_ids (I64): a and b hold different values",
    'Set "allow: [integer_mismatch]"',
)
def integers_differ(room: Room) -> Arguments:
    room.model("a", seed=1, edit=put("position_ids", [0, 1, 2], "int64"))
    room.model("b", seed=2, like=1, edit=put("position_ids", [0, 1, 3], "int64"))
    return room.recipe()


@case("an integer tensor with other values, allowed", 0, "22 tensors")
def integers_differ_allowed(room: Room) -> Arguments:
    integers_differ(room)
    return room.recipe(LINEAR + "allow: [integer_mismatch]\n")


@case(
    "an integer tensor of another type",
    2,
    "position_ids: integer tensors differ in dtype or shape: a I64 [3], b I32 [3]",
)
def integer_kinds_differ(room: Room) -> Arguments:
    room.model("a", seed=1, edit=put("position_ids", [0, 1, 2], "int64"))
    room.model("b", seed=2, like=1, edit=put("position_ids", [0, 1, 2], "int32"))
    return room.recipe()


@case(
    "a tensor that is integer here and float there",
    2,
    "scale: integer tensors differ in dtype or shape: a I64 [1], b F32 [1]",
)
def integer_and_float(room: Room) -> Arguments:
    room.model("a", seed=1, edit=put("scale", [1], "int64"))
    room.model("b", seed=2, like=1, edit=put("scale", [1.0]))
    return room.recipe()


# --- bases -------------------------------------------------------------------------------------------------------


@case(
    "a base that is not the base",
    1,
    "b is not a fine-tune of a: its task vector is 1.4",
    'set "allow: [unrelated_base]"',
)
def unrelated_base(room: Room) -> Arguments:
    room.model("a", seed=1, hidden=64)
    room.model("b", seed=2, hidden=64)
    return room.recipe(TASK)


@case("a base that is not the base, allowed", 0, "21 tensors")
def unrelated_base_allowed(room: Room) -> Arguments:
    unrelated_base(room)
    return room.recipe(TASK + "allow: [unrelated_base]\n")


@case(
    "a model that equals its base",
    1,
    "b equals the base a in every tensor: its task vector is zero",
    "zero_task_vector",
)
def zero_task_vector(room: Room) -> Arguments:
    room.model("a", seed=1)
    room.model("b", seed=1)
    return room.recipe(TASK)


@case("a model that equals its base, allowed", 0, "21 tensors")
def zero_task_vector_allowed(room: Room) -> Arguments:
    zero_task_vector(room)
    return room.recipe(TASK + "allow: [zero_task_vector]\n")


# --- layers ------------------------------------------------------------------------------------------------------

STACK = "merge_method: passthrough\nslices:\n  - sources: [{model: a, layer_range: [0, 2]}]\n"


@case("slices of a model without layers", 2, "r.yaml:3: a has no stack of layers that its config confirms")
def slices_without_layers(room: Room) -> Arguments:
    def only_embedding(tensors: Tensors) -> None:
        for name in list(tensors):
            if name != EMBEDDING:
                del tensors[name]

    room.model("a", edit=only_embedding)
    return room.recipe(STACK)


@case("slices with a base_model without layers", 2, "b has no stack of layers that its config confirms")
def base_without_layers(room: Room) -> Arguments:
    room.model("a")
    room.model("b", edit=lambda tensors: [tensors.pop(name) for name in list(tensors) if name != EMBEDDING])
    source = "{model: a, layer_range: [0, 2], parameters: {weight: 1}}"
    return room.recipe(f"merge_method: linear\nbase_model: b\nslices:\n  - sources: [{source}]\n")


@case(
    "a layer range beyond the model",
    2,
    "r.yaml:3: layer_range [0, 3] ends after the last layer: a has 2 layers",
    "The largest end is 2",
)
def range_beyond_model(room: Room) -> Arguments:
    room.model("a")
    return room.recipe(STACK.replace("[0, 2]", "[0, 3]"))


@case("a layer number of thousands of digits", 0, "22 tensors")
def endless_layer_number(room: Room) -> Arguments:
    room.pair(edit=put(f"model.layers.{'9' * 5000}.weight", [1.0]))
    return room.recipe()


@case(
    "per-layer lists in config.json that are too short",
    1,
    "b/config.json: layer_types: expected a list with one value for each layer, up to layer 1, found ['full']",
)
def short_layer_list(room: Room) -> Arguments:
    room.model("a", config={"layer_types": ["full", "sliding"]})
    room.model("b", config={"layer_types": ["full"]})
    return room.recipe(STACK + "  - sources: [{model: b, layer_range: [1, 2]}]\n")


# --- odd, and fine -----------------------------------------------------------------------------------------------


@case("one tied model and one that is not", 0, "21 tensors", "b: its head is tied")
def tied_and_untied(room: Room) -> Arguments:
    return _with_b(room, tied=True, like=None)


@case("two tied models", 0, "20 tensors")
def both_tied(room: Room) -> Arguments:
    return room.pair_and_recipe(tied=True)


@case("no tokenizer anywhere", 0, "21 tensors", "note: a has no tokenizer files; the result will have none")
def no_tokenizer(room: Room) -> Arguments:
    arguments = room.pair_and_recipe()
    for name in "ab":
        (room.path / name / "tokenizer.json").unlink()
    return arguments


@case("a tokenizer asked of a model that has none", 2, "r.yaml:7: b has no tokenizer files")
def named_tokenizer_missing(room: Room) -> Arguments:
    room.pair()
    (room.path / "b" / "tokenizer.json").unlink()
    return room.recipe(LINEAR + "tokenizer_source: b\n")


@case("tensors without elements", 0, "23 tensors")
def no_elements(room: Room) -> Arguments:
    def edit(tensors: Tensors) -> None:
        tensors["empty"] = (np.ones((0, 4), np.float32), "float32")
        tensors["wide"] = (np.ones((4, 0), np.float32), "float32")

    return room.pair_and_recipe(TASK, edit=edit)


def _with_endless_rows(room: Room) -> Arguments:
    """A tensor of no rows, each of which would take 4 TiB."""
    empty = {"dtype": "F32", "shape": [0, 2**40], "data_offsets": [0, 0]}
    for path in room.pair():
        edit_header(path / "model.safetensors", lambda header: header.update(empty=empty))
    method = "merge_method: della\nbase_model: a\nmodels: [{model: b, parameters: {weight: 1, density: 0.5}}]\n"
    return room.recipe(method + "parameters: {epsilon: 0.1}\n")


@case("a tensor of no rows, each of 4 TiB", 0, "22 tensors")
def endless_rows(room: Room) -> Arguments:
    return _with_endless_rows(room)


@case("verify: a tensor of no rows, each of 4 TiB", 0, "22 tensors and 4 files as written")
def verified_endless_rows(room: Room) -> Arguments:
    room.run_before(_with_endless_rows(room))
    return ["verify", "out"]


@case("tensors that are a single number", 0, "23 tensors")
def single_numbers(room: Room) -> Arguments:
    def edit(tensors: Tensors) -> None:
        tensors["temperature"] = (np.array(0.7, np.float32), "float32")
        tensors["x.embed_tokens.weight"] = (np.array(1.0, np.float32), "float32")

    return room.pair_and_recipe(edit=edit)


@case("tensor names with unicode, quotes and brackets", 0, "25 tensors")
def odd_names(room: Room) -> Arguments:
    def edit(tensors: Tensors) -> None:
        for name in ODD_NAMES:
            tensors[name] = (np.ones(3, np.float32), "float32")

    return room.pair_and_recipe(edit=edit)


ODD_NAMES = ("größe.重み", 'a "quoted"\\name', "[/bold] ../up", "line\nbreak\ttab \x07")


@case("plan --tensors of names with brackets", 0, "[/bold] ../up")
def plan_of_odd_names(room: Room) -> Arguments:
    odd_names(room)
    return ["plan", "r.yaml", "--tensors"]


@case("a model directory with brackets in its name", 0, "[/bold]")
def plan_of_odd_directory(room: Room) -> Arguments:
    room.model("x[/bold]")
    room.recipe('name: "[red]"\nmerge_method: passthrough\nmodels: [{model: "x[/bold]"}]\n')
    return ["plan", "r.yaml"]
