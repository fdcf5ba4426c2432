"""Values, trees and bytes to damage files with."""

from __future__ import annotations

import copy
import json
import math
import random
from collections.abc import Iterator, Sequence
from typing import Any

# What numbers, names and structures are replaced with.
NUMBERS: tuple[Any, ...] = (
    *(0, -1, 1, 2, 3, 7, 8, 64, 1000, 10**6, 1 << 31, (1 << 31) - 1, 1 << 40, 1 << 62, 1 << 63, 1 << 64, 10**40),
    *(10**299, -(10**299), 0.5, -0.0, 1e-320, 1e38, 1e300, 1.5, math.inf, -math.inf, math.nan, True, False),
)
TEXTS: tuple[str, ...] = (
    *("", "a", "b", "..", "../b", "/", "/etc/passwd", "model", "weight", "\ud800", "\x00", "\x1b[31m", "ü" * 50, "\n"),
    *("F32", "BF16", "I64", "F8_E4M3", "F4", "BOOL", "float16", "float8_e4m3fn", "auto", "base", "union", "*", "all"),
    *(
        "ties",
        "linear",
        "passthrough",
        "slerp",
        "x" * 300,
        "y" * 10_000,
        "a b " * 3000,
        "a@b",
        "a+b",
        "a.b.c",
        "{{",
        "{%",
    ),
    *("(a+)+$", "((a|aa)+x?)+b", "[", "(?", "0", "-1", "1e999", "true", "null", "https://x/y", "~", "model.layers.0."),
)
STRUCTURES: tuple[Any, ...] = (
    *(None, [], {}, [[]], [None], [1], ["a"], [0, 1], [1, 0], [0] * 5000, {"a": 1}, {"model": "a"}, {"weight": 1}),
    *({"": ""}, {str(i): i for i in range(2000)}, [{}] * 2000, [["a", 1]]),
)


def value(dice: random.Random) -> Any:
    return copy.deepcopy(dice.choice(dice.choice((NUMBERS, TEXTS, STRUCTURES))))


def chance(dice: random.Random, share: float) -> bool:
    return dice.random() < share


def in_bytes(data: bytes, dice: random.Random, until: int | None = None) -> bytes:
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
                pieces = (b"9" * 30, b"9" * 5000, b"{" * 300, b"[" * 30, b'"', b"\x00", b"-", b"e9", b"\xff" * 4)
                result[place:place] = dice.choice(pieces)
            case 5:
                del result[place:]
    return bytes(result)


def in_tree(tree: Any, dice: random.Random) -> Any:
    """One to three values of a JSON or YAML tree replaced, removed, doubled, renamed or nested."""
    tree = copy.deepcopy(tree)
    for _ in range(dice.randint(1, 3)):
        holders = [item for item in walk(tree) if isinstance(item, (dict, list)) and item]
        if not holders:
            return value(dice)
        holder = dice.choice(holders)
        key = dice.choice(list(holder) if isinstance(holder, dict) else range(len(holder)))
        match dice.randrange(7):
            case 0:
                del holder[key]
            case 1 if isinstance(holder, dict):
                holder[str(value(dice))] = holder.pop(key)
            case 2:
                holder[key] = copy.deepcopy(dice.choice([item for other in holders for item in values_of(other)]))
            case 3:
                holder[key] = [copy.deepcopy(holder[key]) for _ in range(dice.choice((0, 1, 2, 3, 300)))]
            case 4:
                holder[key] = nested(holder[key], dice)
            case _:
                holder[key] = value(dice)
    return tree


def nested(inner: Any, dice: random.Random) -> Any:
    """Inside many lists or objects."""
    for _ in range(dice.choice((1, 10, 60, 70, 200))):
        inner = [inner] if chance(dice, 0.5) else {"a": inner}
    return inner


def walk(tree: Any) -> Iterator[Any]:
    yield tree
    for item in values_of(tree):
        yield from walk(item)


def values_of(tree: Any) -> list[Any]:
    if isinstance(tree, dict):
        return list(tree.values())
    return tree if isinstance(tree, list) else []


def json_text(tree: Any, dice: random.Random) -> bytes:
    """A damaged tree as JSON, and now and then what no tree gives: damaged text, doubled names, floods of values."""
    if chance(dice, 0.1):
        return flood(dice)
    if not chance(dice, 0.15):
        tree = in_tree(tree, dice)
    text = json.dumps(tree, ensure_ascii=chance(dice, 0.5)).encode("utf-8", "surrogatepass")
    if chance(dice, 0.1) and text.startswith(b"{") and len(text) > 2:  # the first name twice
        text = b"{" + text[1:].partition(b",")[0].rstrip(b"}") + b"," + text[1:]
    return in_bytes(text, dice) if chance(dice, 0.2) else text


def flood(dice: random.Random) -> bytes:
    """Texts that are short for what they become."""
    many = dice.choice((3, 1000, 100_000))
    texts = (
        b"[" * many,
        b'{"a":' * many,
        b"[" + b"[]," * many + b"[]]",
        b'{"a":[' + b"{}," * many + b"{}]}",
        b"9" * many,
        b'{"a":-' + b"1" * many + b"e5}",
        b'{"a":1.' + b"1" * many + b"}",
        b'{"a":"' + b"x" * many + b'"}',
        b'{"a":"' + b"\\ud800" * many + b'"}',
        b"{" + b",".join(b'"%d":%d' % (i, i) for i in range(many)) + b',"0":1}',
        b" " * many,
        b"\xef\xbb\xbf{}",
        b'{"a":NaN,"b":Infinity}',
        b"\x00" * many,
    )
    return dice.choice(texts)


def sizes(dice: random.Random) -> list[Any]:
    """A shape that may be absurd."""
    return dice.choice(
        (
            *(
                [],
                [0],
                [1],
                [8],
                [0, 8],
                [8, 0],
                [0, 2**62],
                [2**62, 0],
                [0, 2**40],
                [2**40, 0],
                [2**40],
                [2**31, 2**31],
            ),
            *([2**62, 4], [2**63], [2**64, 0], [-1], [-1, -8], [1] * 65, [2] * 63, [1] * 5000, [8.0], ["8"], [True, 8]),
            *([None], [[8]], [10**300], [0] * 64, [8, 8, 0], [1, 1, 1, 8, 8]),
        )
    )


def some_of(items: Sequence[Any], dice: random.Random) -> list[Any]:
    return dice.sample(list(items), dice.randint(1, min(3, len(items))))
