"""Questions that a program makes and answers: sums, lists, facts to find in a text, conclusions from three of them.

Each set is drawn from a seed and has a digest, so that every machine and version of Python asks the same. Kinds of
questions and places of right answers come in turn, each as often as the others.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from merge.errors import MergeError

Row = dict[str, Any]
Draw = Callable[[random.Random, int], Row]  # (rng, place among the rows)
# set:part:rows -> SHA-256 of the rows, its first 16 digits
DIGESTS: Mapping[str, str] = {
    "core_arithmetic:test:160": "8c8c6204294f56c7",
    "core_arithmetic:examples:4": "37985bc0a0384d31",
    "core_logic:test:150": "22dc8072952fe080",
    "core_lists:test:120": "cf9628ea21d3d2c1",
    "core_lists:examples:4": "39c267f2f0c4be32",
    "core_lookup:test:120": "4648fafc06161355",
    "core_lookup:examples:4": "1cbe91a6d2bd38ad",
    "core_json:test:100": "004f24851ec6602f",
    "core_json:examples:4": "f2648e9cdb9fe9c1",
    "core_tools:test:100": "9d703b01714c34cc",
    "core_tools:examples:4": "a777de2eeb1e0bd4",
}


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


NAMES = _words("Anna Ben Clara David Emma Felix Grace Henry Irene Jack Laura Marco Nina Oscar Paula Robert Sarah Tom")
CITIES = _words("Oslo Rome Paris London Madrid Berlin Vienna Dublin Lisbon Athens Prague Warsaw")
_JOBS = _words("teacher painter doctor farmer baker pilot singer lawyer cook driver writer nurse")
_WORDS = _words("apple river chair table house green music paper stone cloud bread horse night water garden window")
_DAYS = _words("Monday Tuesday Wednesday Thursday Friday Saturday Sunday")
_PLACES = _words("box drawer basket bag cupboard pocket")
_THINGS = _words("cup plate bowl hat coat lamp")
_COLOURS = _words("red blue green yellow white black")
_NUMBERS = _words("one two three four five six")


def make(name: str, n: int, draw: Draw, *, part: str = "test") -> list[Row]:
    """n different rows of a set.

    Raises:
        MergeError: they are not those of the digest.
    """
    rng = random.Random(f"{name}:{part}")
    rows: dict[str, Row] = {}
    while len(rows) < n:
        row = draw(rng, len(rows))
        rows.setdefault(json.dumps(row), row)
    return checked(name, part, list(rows.values()))


def checked(name: str, part: str, rows: list[Row]) -> list[Row]:
    """The rows, if they are those of the digest."""
    if DIGESTS.get(f"{name}:{part}:{len(rows)}", digest := digest_of(rows)) != digest:
        raise MergeError(f"{name}: this version of Python draws other items; results could not be compared.")
    return rows


def sums(n: int, part: str = "test") -> list[Row]:
    """n different questions, four kinds in turn, with their answers."""
    rng = random.Random(part)
    found: dict[str, str] = {}
    while len(found) < n:
        kind = len(found) % 4
        a, b, c = rng.randint(2, 60), rng.randint(2, 60), rng.randint(2, 9)
        a, b = max(a, b), min(a, b)
        asked, answer = (
            (f"What is {a} + {b}?", a + b),
            (f"What is {a} - {b}?", a - b),
            (f"What is {a % 8 + 2} * {c}?", (a % 8 + 2) * c),
            (f"Tom has {a} apples. He gives {b} of them away and buys {c} more. How many has he now?", a - b + c),
        )[kind]
        found.setdefault(asked, str(answer))
    return checked("core_arithmetic", part, [{"question": each, "answer": answer} for each, answer in found.items()])


def digest_of(rows: Sequence[Mapping[str, Any]]) -> str:
    text = "".join(json.dumps(row, sort_keys=True) + "\n" for row in rows)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def draw_logic(rng: random.Random, place: int) -> Row:
    """One of three choices follows from the text."""
    text, right, wrong = _LOGIC[place % len(_LOGIC)](rng)
    answer = place // len(_LOGIC) % 3
    return {"text": text, "choices": [*wrong[:answer], right, *wrong[answer:]], "answer": answer}


def _order(rng: random.Random) -> tuple[str, str, list[str]]:
    (a, b, c), (more, most) = rng.sample(NAMES, 3), rng.choice([("taller", "tallest"), ("older", "oldest")])
    facts = [f"{a} is {more} than {b}.", f"{b} is {more} than {c}."]
    rng.shuffle(facts)
    return f"{' '.join(facts)} The {most} of the three is", a, [b, c]


def _moved(rng: random.Random) -> tuple[str, str, list[str]]:
    (who, other), (first, then, never) = rng.sample(NAMES, 2), rng.sample(_PLACES, 3)
    thing = rng.choice(["key", "ball", "book", "letter"])
    text = (
        f"{who} puts the {thing} into the {first}. The {never} is empty. Then {other} moves the {thing} to the {then}."
    )
    return f"{text} Now the {thing} is in the", then, [first, never]


def _coloured(rng: random.Random) -> tuple[str, str, list[str]]:
    things, colours = rng.sample(_THINGS, 3), rng.sample(_COLOURS, 3)
    facts = [f"the {thing} is {colour}" for thing, colour in zip(things, colours, strict=True)]
    chosen = rng.randrange(3)
    text = f"T{facts[0][1:]}, {facts[1]} and {facts[2]}. The thing that is {colours[chosen]} is the"
    return text, things[chosen], [thing for thing in things if thing != things[chosen]]


def _day(rng: random.Random) -> tuple[str, str, list[str]]:
    today, away = rng.randrange(7), rng.randint(2, 4)
    others = rng.sample([day for day in range(7) if day != (today + away) % 7], 2)
    text = f"Today is {_DAYS[today]}. In {_NUMBERS[away - 1]} days it will be"
    return text, _DAYS[(today + away) % 7], [_DAYS[day] for day in others]


def _extreme(rng: random.Random) -> tuple[str, str, list[str]]:
    numbers, which = rng.sample(range(10, 100), 3), rng.choice(["largest", "smallest"])
    right = max(numbers) if which == "largest" else min(numbers)
    text = f"Of the numbers {numbers[0]}, {numbers[1]} and {numbers[2]} the {which} is"
    return text, str(right), [str(number) for number in numbers if number != right]


_LOGIC = (_order, _moved, _coloured, _day, _extreme)


def draw_lists(rng: random.Random, place: int) -> Row:
    """A question on a list of words, with the one right answer."""
    words = rng.sample(_WORDS, rng.randint(3, 5))
    asked, answer = (
        ("What is the last word", words[-1]),
        ("What is the second word", words[1]),
        ("Which word comes first in the alphabet", min(words)),
        ("What are the words backwards", ", ".join(reversed(words))),
    )[place % 4]
    return {"question": f"{asked}: {', '.join(words)}?", "answer": answer}


def draw_lookup(rng: random.Random, place: int) -> Row:
    """A question that one of four lines answers."""
    people = list(
        zip(
            rng.sample(NAMES, 4), rng.sample(range(21, 70), 4), rng.sample(_JOBS, 4), rng.sample(CITIES, 4), strict=True
        )
    )
    text = "\n".join(f"{name} is {age} years old and works as a {job} in {city}." for name, age, job, city in people)
    name, age, job, city = rng.choice(people)
    asked, answer = (
        (f"How old is {name}?", str(age)),
        (f"Where does {name} work?", city),
        (f"Who works in {city}?", name),
        (f"Who is the {job}?", name),
    )[place % 4]
    return {"question": f"{text}\nQuestion: {asked}", "answer": answer}
