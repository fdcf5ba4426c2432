"""Files damaged at random, about a minute of it: whatever happens, `merge` ends with 0, 1 or 2 and one message."""

from __future__ import annotations

import contextlib
import copy
import json
import os
import random
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from bad_inputs.room import LINEAR, Arguments, Room, call, read_parts, write_parts

SECONDS = float(os.environ.get("FUZZ_SECONDS", "60")) / 10  # of each of the ten tests
RUN = ["run", "r.yaml", "-o", "out", "--threads", "2"]
SLICES = """\
merge_method: linear
slices:
  - sources:
      - {model: a, layer_range: [0, 2], parameters: {weight: 0.5}}
      - {model: b, layer_range: [0, 2], parameters: {weight: 0.5}}
"""
TIES = """\
merge_method: ties
base_model: a
models:
  - model: b
    parameters:
      weight: [{filter: mlp, value: 1}, {value: [0, 1]}]
      density: 0.5
parameters: {lambda: 0.9, trim: model, rescale: l1, int8_mask: true}
"""
DARE = """\
merge_method: dare_ties
base_model: {model: {path: a}}
models: [{model: b, parameters: {weight: 1, density: 0.3}}]
"""
RECIPES = (
    LINEAR + "parameters: {normalize: true}\ndtype: float32\nseed: 3\nallow: [nonfinite]\n",
    SLICES + "out_dtype: float16\ntokenizer_source: base\n",
    TIES,
    "merge_method: slerp\nbase_model: a\nmodels: [{model: a}, {model: b}]\nparameters: {t: [0, 0.5, 1]}\nname: x\n",
    DARE,
)
# What numbers, names and structures are replaced with.
VALUES: tuple[Any, ...] = (
    *(
        0,
        -1,
        1,
        2,
        3,
        7,
        8,
        1 << 31,
        1 << 63,
        1 << 64,
        10**40,
        0.5,
        -0.0,
        1e-320,
        1e38,
        1e300,
        float("inf"),
        float("nan"),
    ),
    *(
        "",
        "a",
        "b",
        "..",
        "/",
        "model",
        "weight",
        "\ud800",
        "\x00",
        "ü" * 50,
        "F32",
        "BF16",
        "I64",
        "F8_E4M3",
        "float16",
    ),
    *("ties", "linear", "passthrough", "x" * 300, "a@b", "a+b", "*"),
    *(None, True, False, [], {}, [[]], [1], ["a"], {"a": 1}, {"model": "a"}, [0, 1], [1, 0], {"weight": 1}),
)


@pytest.fixture
def room(tmp_path: Path) -> Iterator[Room]:
    with contextlib.ExitStack() as stack:
        stack.enter_context(contextlib.chdir(tmp_path))
        stack.enter_context(pytest.MonkeyPatch.context()).setenv("HF_HUB_OFFLINE", "1")
        yield Room(tmp_path, stack)


def hold(room: Room, damage: Callable[[random.Random], Arguments], check: Callable[[], None] = lambda: None) -> None:
    """Damages and runs, until the time is up. A message names the seed, so that a failure can be had again."""
    end, seed = time.monotonic() + SECONDS, 0
    codes: dict[int, int] = {}
    while time.monotonic() < end:
        seed += 1
        arguments = damage(random.Random(seed))
        try:
            code, out, err = call(arguments)
            assert code in (0, 1, 2), code
            assert "Traceback" not in err
            assert code == 0 or err.startswith(("merge: ", "note: ", "Usage: "))
            assert code == 0 or out == "" or arguments[0] == "verify"
            assert code == 0 or not (room.path / "out").exists() or arguments[0] == "verify"
            if code == 0:
                check()
        except BaseException as error:
            error.add_note(f"seed {seed} of {arguments}")
            raise
        codes[code] = codes.get(code, 0) + 1
        if arguments[0] != "verify":
            for name in ("out", "out.partial", "merged"):
                shutil.rmtree(room.path / name, ignore_errors=True)
    print(f"\n{seed} times: {dict(sorted(codes.items()))}", end=" ")


def verifies() -> None:
    assert call(["verify", "out"])[0] == 0


def damaged_bytes(data: bytes, dice: random.Random, until: int | None = None) -> bytes:
    """One to three bytes or pieces flipped, cut out, doubled, put in or cut off, before byte `until`."""
    result = bytearray(data)
    for _ in range(dice.randint(1, 3)):
        place = dice.randrange(max(1, min(len(result), until or len(result))))
        length = dice.choice((1, 1, 2, 4, 8, 30))
        match dice.randrange(6):
            case 0:
                result[place : place + 1] = bytes([result[place] ^ (1 << dice.randrange(8))]) if result else b""
            case 1:
                result[place : place + length] = dice.randbytes(length)
            case 2:
                del result[place : place + length]
            case 3:
                result[place:place] = result[place : place + length]
            case 4:
                result[place:place] = dice.choice(
                    (b"9" * 30, b"{" * 30, b'"', b"\x00", b"-", b"e9", b"\xff\xff\xff\xff")
                )
            case 5:
                del result[place:]
    return bytes(result)


def damaged_tree(tree: Any, dice: random.Random) -> Any:
    """One to three values of a JSON or YAML tree replaced, removed, doubled or exchanged."""
    tree = copy.deepcopy(tree)
    for _ in range(dice.randint(1, 3)):
        holders = [item for item in walk(tree) if isinstance(item, (dict, list)) and item]
        if not holders:
            return dice.choice(VALUES)
        holder = dice.choice(holders)
        key = dice.choice(list(holder) if isinstance(holder, dict) else range(len(holder)))
        match dice.randrange(6):
            case 0:
                del holder[key]
            case 1 if isinstance(holder, dict):
                holder[str(dice.choice(VALUES))] = holder.pop(key)
            case 2:
                holder[key] = copy.deepcopy(dice.choice([item for other in holders for item in values_of(other)]))
            case 3:
                holder[key] = [copy.deepcopy(holder[key]) for _ in range(dice.randint(0, 3))]
            case _:
                holder[key] = copy.deepcopy(dice.choice(VALUES))
    return tree


def walk(tree: Any) -> Iterator[Any]:
    yield tree
    for item in values_of(tree):
        yield from walk(item)


def values_of(tree: Any) -> list[Any]:
    if isinstance(tree, dict):
        return list(tree.values())
    return tree if isinstance(tree, list) else []


def any_recipe(room: Room, dice: random.Random) -> None:
    room.recipe(dice.choice(RECIPES))


@pytest.mark.full
def test_damaged_safetensors_files(room: Room) -> None:
    _, b = room.pair()
    whole = (b / "model.safetensors").read_bytes()
    header = 8 + int.from_bytes(whole[:8], "little")

    def damage(dice: random.Random) -> Arguments:
        any_recipe(room, dice)
        (b / "model.safetensors").write_bytes(damaged_bytes(whole, dice, dice.choice((8, header, header, None))))
        return RUN

    hold(room, damage, verifies)


@pytest.mark.full
def test_damaged_headers(room: Room) -> None:
    _, b = room.pair()
    header, data = read_parts(b / "model.safetensors")

    def damage(dice: random.Random) -> Arguments:
        any_recipe(room, dice)
        write_parts(b / "model.safetensors", json.dumps(damaged_tree(header, dice)).encode(), data)
        return RUN

    hold(room, damage, verifies)


@pytest.mark.full
@pytest.mark.parametrize("name", ["config.json", "model.safetensors.index.json", "tokenizer.json"])
def test_damaged_json_files(room: Room, name: str) -> None:
    lists = {"layer_types": ["x", "y"], "text_config": {"num_hidden_layers": 2}, "quantization_config": {}}
    _, b = room.pair(shards=2, config=lists)
    vocabulary = {"model": {"vocab": {"x": 0, "y": 1}}, "added_tokens": [{"content": "z", "id": 2}]}
    (room.path / "a" / "tokenizer.json").write_text(json.dumps(vocabulary))
    vocabulary["model"]["vocab"]["y"] = 3
    (b / "tokenizer.json").write_text(json.dumps(vocabulary))
    whole = json.loads((b / name).read_text())

    def damage(dice: random.Random) -> Arguments:
        any_recipe(room, dice)
        text = json.dumps(whole if dice.random() < 0.3 else damaged_tree(whole, dice)).encode()
        (b / name).write_bytes(damaged_bytes(text, dice) if dice.random() < 0.3 else text)
        return RUN

    hold(room, damage, verifies)


@pytest.mark.full
def test_damaged_pickles(room: Room) -> None:
    import torch

    _, b = room.pair()
    (b / "model.safetensors").unlink()
    tensors = {"x": torch.arange(6.0).reshape(2, 3).T, "y": torch.ones(3, dtype=torch.bfloat16)}
    wholes = []
    for is_zip in (True, False):
        torch.save(tensors, b / "pytorch_model.bin", _use_new_zipfile_serialization=is_zip)
        wholes.append((b / "pytorch_model.bin").read_bytes())
    room.recipe("merge_method: passthrough\nmodels: [{model: b}]\n")

    def damage(dice: random.Random) -> Arguments:
        (b / "pytorch_model.bin").write_bytes(damaged_bytes(dice.choice(wholes), dice))
        return RUN

    hold(room, damage, verifies)


@pytest.mark.full
def test_damaged_recipes(room: Room) -> None:
    room.pair()

    def damage(dice: random.Random) -> Arguments:
        tree = damaged_tree(yaml.safe_load(dice.choice(RECIPES)), dice)
        with contextlib.suppress(ValueError, yaml.YAMLError):
            room.recipe(yaml.safe_dump(tree, allow_unicode=True))
        return dice.choice((RUN, RUN, ["run", "r.yaml", "--quiet"]))

    hold(room, damage)


@pytest.mark.full
def test_damaged_recipe_texts(room: Room) -> None:
    room.pair()

    def damage(dice: random.Random) -> Arguments:
        (room.path / "r.yaml").write_bytes(damaged_bytes(dice.choice(RECIPES).encode(), dice))
        return RUN

    hold(room, damage)


@pytest.mark.full
def test_damaged_journals(room: Room) -> None:
    """Whatever is left in the journal: what the run then gives is right to the byte, or it is refused."""
    room.pair()
    room.recipe(TIES)
    assert call(RUN)[0] == 0
    expected = {path.name: path.read_bytes() for path in Path("out").iterdir()}
    shutil.rmtree("out")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("merge.output.writer.OutputDirectory.complete", _stop)
        assert call(RUN)[0] == 130
    Path("out.partial").rename("kept")

    def damage(dice: random.Random) -> Arguments:
        shutil.copytree("kept", "out.partial")
        journal = Path("out.partial/journal.jsonl")
        journal.write_bytes(damaged_bytes(journal.read_bytes(), dice))
        if dice.random() < 0.3:
            weights = Path("out.partial/result/model.safetensors")
            weights.write_bytes(damaged_bytes(weights.read_bytes(), dice))
        return RUN

    def same() -> None:
        assert {path.name: path.read_bytes() for path in Path("out").iterdir()} == expected

    hold(room, damage, same)


def _stop(*arguments: object) -> None:
    raise KeyboardInterrupt


@pytest.mark.full
def test_damaged_manifests_and_outputs(room: Room) -> None:
    room.run_before([*room.pair_and_recipe(), "--shard-size", "6kB", "--quiet"])
    files = {path: path.read_bytes() for path in Path("out").iterdir()}
    manifest = Path("out/merge_manifest.json")
    tree = json.loads(files[manifest])

    def damage(dice: random.Random) -> Arguments:
        for path, data in files.items():
            path.write_bytes(data)
        if dice.random() < 0.5:
            manifest.write_text(json.dumps(damaged_tree(tree, dice)))
        else:
            path = dice.choice(list(files))
            path.write_bytes(damaged_bytes(files[path], dice))
        return ["verify", "out"]

    hold(room, damage)
