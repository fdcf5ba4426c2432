"""Recipes that are wrong by themselves. What the parser says of each word is in tests/test_recipe_problems.py."""

from __future__ import annotations

import os

from bad_inputs.room import Arguments, Room, set_up

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


@set_up
def alias_bomb(room: Room) -> Arguments:
    lines = ["merge_method: linear", "a0: &a0 [x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 30)]
    return _bytes(room, "\n".join(lines).encode())


@set_up
def binary_recipe(room: Room) -> Arguments:
    return _bytes(room, bytes([1, 200, 3, 0]) * 100)


@set_up
def huge_recipe(room: Room) -> Arguments:
    return _bytes(room, b"# " + b"x" * 2_000_000)


@set_up
def endless_recipe_name(room: Room) -> Arguments:
    return ["run", "x" * 300]


@set_up
def pipe_as_recipe(room: Room) -> Arguments:
    os.mkfifo(room.path / "r.yaml")
    return ["run", "r.yaml"]


@set_up
def slerp_of_three(room: Room) -> Arguments:
    room.model("c")
    return room.pair_and_recipe(SLERP.replace("  - model: b\n", "  - model: b\n  - model: c\n"))


@set_up
def slerp_base_not_listed(room: Room) -> Arguments:
    room.model("c")
    return room.pair_and_recipe(SLERP.replace("  - model: a\n", "  - model: c\n"))
