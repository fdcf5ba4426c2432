"""Data from which a tiny model learns something in seconds, for every objective. All by seed."""

from __future__ import annotations

import random
from string import ascii_lowercase
from typing import Any

from tiny_llama import words


def rounds(count: int, seed: int = 0) -> list[dict[str, Any]]:
    """Texts such as `bdfbdfbdf`: whoever sees a round of it can continue it, and fill its gaps."""
    rng = random.Random(seed)
    drawn = [rng.sample(ascii_lowercase[:8], 3) for _ in range(count)]
    return [{"text": "".join(letters * rng.randint(4, 6))} for letters in drawn]


def moods(count: int, seed: int = 0) -> list[dict[str, Any]]:
    """Words of letters, labelled by which letters are frequent in them."""
    rng = random.Random(seed)
    kinds = {"high": "abcd", "low": "wxyz", "flat": "klmn"}
    rows = []
    for _ in range(count):
        label = rng.choice(list(kinds))
        letters = rng.choices(kinds[label], k=5) + rng.choices(ascii_lowercase, k=4)
        rng.shuffle(letters)
        rows.append({"text": "".join(letters), "label": label})
    return rows


def choices(count: int, seed: int = 0) -> list[dict[str, Any]]:
    """Of two answers the one in capitals is the better."""
    rows = words(count, seed)
    return [{"prompt": row["prompt"], "chosen": row["completion"], "rejected": row["prompt"][:-1]} for row in rows]


def shifts(count: int, seed: int = 0) -> list[dict[str, Any]]:
    """Words that belong together: `acx` and `bdy`, each letter the next in the alphabet."""
    rng = random.Random(seed)
    rows = []
    for _ in range(count):
        word = "".join(rng.sample(ascii_lowercase[:-1], 5))
        rows.append({"anchor": word, "positive": "".join(chr(ord(letter) + 1) for letter in word)})
    return rows


def judged(count: int, seed: int = 0) -> list[dict[str, Any]]:
    """The answers of choices(), one by one, wanted or not."""
    return [
        {"prompt": row["prompt"], "completion": row[side], "label": side == "chosen"}
        for row in choices(count, seed)
        for side in ("chosen", "rejected")
    ]
