"""Models that do not fit each other, and numbers that do not fit their dtype."""

from __future__ import annotations

from typing import Any

import numpy as np

from bad_inputs.room import LINEAR, TASK, Arguments, Room, Tensors, edit_header, set_up

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


@set_up
def nan_weights(room: Room) -> Arguments:
    return _with_b(room, edit=spoil(float("nan")))


@set_up
def nan_weights_allowed(room: Room) -> Arguments:
    return _with_b(room, LINEAR + "allow: [nonfinite]\n", edit=spoil(float("nan")))


@set_up
def infinite_weights(room: Room) -> Arguments:
    return _with_b(room, edit=spoil(float("inf"), 1))


@set_up
def infinite_weights_allowed(room: Room) -> Arguments:
    return _with_b(room, TASK + "allow: [nonfinite]\n", edit=spoil(float("inf"), 1))


@set_up
def float16_overflow(room: Room) -> Arguments:
    return _with_b(room, LINEAR + "out_dtype: float16\n", edit=spoil(2e5))


@set_up
def float16_overflow_allowed(room: Room) -> Arguments:
    return _with_b(room, LINEAR + "out_dtype: float16\nallow: [overflow]\n", edit=spoil(2e5))


@set_up
def bfloat16_overflow(room: Room) -> Arguments:
    text = LINEAR.replace("weight: 0.5", "weight: 1") + "parameters: {normalize: false}\ndtype: bfloat16\n"
    return _with_b(room, text, edit=spoil(3.4e38, 1))


@set_up
def float8_overflow(room: Room) -> Arguments:
    text = LINEAR.replace("model: b\n    parameters: {weight: 0.5}", "model: b\n    parameters: {weight: 0}")
    room.model("a", seed=1, edit=spoil(1000, 2))
    room.model("b", seed=2, like=1)
    return room.recipe(text + "out_dtype: float8_e4m3fn\n")


@set_up
def float64_overflow(room: Room) -> Arguments:
    room.pair(edit=put("wide.weight", [1e300, 1e300], "float64"))
    return room.recipe(LINEAR + "out_dtype: float32\n")


@set_up
def huge_float64(room: Room) -> Arguments:
    room.pair(edit=put("wide.weight", [1e300, 1e300], "float64"))
    return room.recipe()


# --- shapes, names, kinds ----------------------------------------------------------------------------------------


@set_up
def vocabularies_differ(room: Room) -> Arguments:
    return _with_b(room, edit=put(EMBEDDING, np.ones((40, 8))))


@set_up
def shapes_differ(room: Room) -> Arguments:
    return _with_b(room, edit=put(Q, np.ones((4, 8))))


@set_up
def shapes_differ_allowed(room: Room) -> Arguments:
    return _with_b(room, LINEAR + "allow: [shape_mismatch]\n", edit=put(Q, np.ones((4, 8))))


@set_up
def another_width(room: Room) -> Arguments:
    room.model("a", seed=1)
    room.model("b", seed=2, hidden=16)
    return room.recipe()


@set_up
def nothing_in_common(room: Room) -> Arguments:
    def rename(tensors: Tensors) -> None:
        for number, name in enumerate(list(tensors)):
            tensors[f"t{number}"] = tensors.pop(name)

    return _with_b(room, edit=rename)


@set_up
def missing_tensor(room: Room) -> Arguments:
    return _with_b(room, edit=lambda tensors: tensors.pop(Q))


@set_up
def missing_tensor_allowed(room: Room) -> Arguments:
    return _with_b(room, LINEAR + "allow: [missing_tensors]\n", edit=lambda tensors: tensors.pop(Q))


@set_up
def missing_in_base_allowed(room: Room) -> Arguments:
    room.model("a", seed=1, edit=lambda tensors: tensors.pop(Q))
    room.model("b", seed=2, like=1)
    return room.recipe(TASK + "allow: [missing_tensors]\n")


@set_up
def integers_differ(room: Room) -> Arguments:
    room.model("a", seed=1, edit=put("position_ids", [0, 1, 2], "int64"))
    room.model("b", seed=2, like=1, edit=put("position_ids", [0, 1, 3], "int64"))
    return room.recipe()


@set_up
def integers_differ_allowed(room: Room) -> Arguments:
    integers_differ(room)
    return room.recipe(LINEAR + "allow: [integer_mismatch]\n")


@set_up
def integer_kinds_differ(room: Room) -> Arguments:
    room.model("a", seed=1, edit=put("position_ids", [0, 1, 2], "int64"))
    room.model("b", seed=2, like=1, edit=put("position_ids", [0, 1, 2], "int32"))
    return room.recipe()


@set_up
def integer_and_float(room: Room) -> Arguments:
    room.model("a", seed=1, edit=put("scale", [1], "int64"))
    room.model("b", seed=2, like=1, edit=put("scale", [1.0]))
    return room.recipe()


# --- bases -------------------------------------------------------------------------------------------------------


@set_up
def unrelated_base(room: Room) -> Arguments:
    room.model("a", seed=1, hidden=64)
    room.model("b", seed=2, hidden=64)
    return room.recipe(TASK)


@set_up
def unrelated_base_allowed(room: Room) -> Arguments:
    unrelated_base(room)
    return room.recipe(TASK + "allow: [unrelated_base]\n")


@set_up
def zero_task_vector(room: Room) -> Arguments:
    room.model("a", seed=1)
    room.model("b", seed=1)
    return room.recipe(TASK)


@set_up
def zero_task_vector_allowed(room: Room) -> Arguments:
    zero_task_vector(room)
    return room.recipe(TASK + "allow: [zero_task_vector]\n")


# --- layers ------------------------------------------------------------------------------------------------------

STACK = "merge_method: passthrough\nslices:\n  - sources: [{model: a, layer_range: [0, 2]}]\n"


@set_up
def slices_without_layers(room: Room) -> Arguments:
    def only_embedding(tensors: Tensors) -> None:
        for name in list(tensors):
            if name != EMBEDDING:
                del tensors[name]

    room.model("a", edit=only_embedding)
    return room.recipe(STACK)


@set_up
def base_without_layers(room: Room) -> Arguments:
    room.model("a")
    room.model("b", edit=lambda tensors: [tensors.pop(name) for name in list(tensors) if name != EMBEDDING])
    source = "{model: a, layer_range: [0, 2], parameters: {weight: 1}}"
    return room.recipe(f"merge_method: linear\nbase_model: b\nslices:\n  - sources: [{source}]\n")


@set_up
def range_beyond_model(room: Room) -> Arguments:
    room.model("a")
    return room.recipe(STACK.replace("[0, 2]", "[0, 3]"))


@set_up
def endless_layer_number(room: Room) -> Arguments:
    room.pair(edit=put(f"model.layers.{'9' * 5000}.weight", [1.0]))
    return room.recipe()


@set_up
def short_layer_list(room: Room) -> Arguments:
    room.model("a", config={"layer_types": ["full", "sliding"]})
    room.model("b", config={"layer_types": ["full"]})
    return room.recipe(STACK + "  - sources: [{model: b, layer_range: [1, 2]}]\n")


# --- odd, and fine -----------------------------------------------------------------------------------------------


@set_up
def tied_and_untied(room: Room) -> Arguments:
    return _with_b(room, tied=True, like=None)


@set_up
def both_tied(room: Room) -> Arguments:
    return room.pair_and_recipe(tied=True)


@set_up
def no_tokenizer(room: Room) -> Arguments:
    arguments = room.pair_and_recipe()
    for name in "ab":
        (room.path / name / "tokenizer.json").unlink()
    return arguments


@set_up
def named_tokenizer_missing(room: Room) -> Arguments:
    room.pair()
    (room.path / "b" / "tokenizer.json").unlink()
    return room.recipe(LINEAR + "tokenizer_source: b\n")


@set_up
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


@set_up
def endless_rows(room: Room) -> Arguments:
    return _with_endless_rows(room)


@set_up
def verified_endless_rows(room: Room) -> Arguments:
    room.run_before(_with_endless_rows(room))
    return ["verify", "out"]


@set_up
def single_numbers(room: Room) -> Arguments:
    def edit(tensors: Tensors) -> None:
        tensors["temperature"] = (np.array(0.7, np.float32), "float32")
        tensors["x.embed_tokens.weight"] = (np.array(1.0, np.float32), "float32")

    return room.pair_and_recipe(edit=edit)


@set_up
def odd_names(room: Room) -> Arguments:
    def edit(tensors: Tensors) -> None:
        for name in ODD_NAMES:
            tensors[name] = (np.ones(3, np.float32), "float32")

    return room.pair_and_recipe(edit=edit)


ODD_NAMES = ("größe.重み", 'a "quoted"\\name', "[/bold] ../up", "line\nbreak\ttab \x07")


@set_up
def plan_of_odd_names(room: Room) -> Arguments:
    odd_names(room)
    return ["plan", "r.yaml", "--tensors"]


@set_up
def plan_of_odd_directory(room: Room) -> Arguments:
    room.model("x[/bold]")
    room.recipe('name: "[red]"\nmerge_method: passthrough\nmodels: [{model: "x[/bold]"}]\n')
    return ["plan", "r.yaml"]
