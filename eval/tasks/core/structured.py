"""core_json and core_tools: answers that have to be JSON, parsed and compared by value.

Two scores of each answer: whether it is a JSON object and nothing else, and whether it is the right one.
"""

from __future__ import annotations

import json
import random
from collections.abc import Mapping, Sequence
from typing import Any

from eval.sandbox.inside.values import encode, same
from eval.tasks.core.generated import CITIES, NAMES, Row
from merge.jsontext import parse_json

METRICS = {"exact_match": True, "valid_json": True}


def check(row: Mapping[str, Any], answers: Sequence[str]) -> dict[str, float]:
    """Of what the model wrote on the first line."""
    try:
        found = parse_json(answers[0].strip().partition("\n")[0])
    except ValueError:
        return dict.fromkeys(METRICS, 0.0)
    right = same(encode(parse_json(row["answer"])), encode(found))
    return {"exact_match": float(right), "valid_json": float(isinstance(found, dict))}


def draw_json(rng: random.Random, place: int) -> Row:
    """Facts in a sentence, and the object that holds them."""
    name, city, other = rng.choice(NAMES), *rng.sample(CITIES, 2)
    n, flag = rng.randint(2, 60), rng.random() < 0.5
    item, pet, call = (
        rng.choice(_ITEMS),
        rng.choice(["cat", "dog", "horse"]),
        rng.choice(["Luna", "Rex", "Milo", "Coco"]),
    )
    text, value = (
        (f"{name} is {n + 10} years old and lives in {city}.", {"name": name, "age": n + 10, "city": city}),
        (
            f"{name} ordered {n} {item} and has {'already' if flag else 'not yet'} paid.",
            {"name": name, "item": item, "count": n, "paid": flag},
        ),
        (f"{name} travels to {city} and then to {other}.", {"name": name, "stops": [city, other]}),
        (f"{name} has a {pet} called {call}.", {"name": name, "pet": {"kind": pet, "name": call}}),
    )[place % 4]
    return {"text": text, "answer": json.dumps(value)}


_ITEMS = ("cups", "chairs", "lamps", "books", "pens", "plates")
_TOOLS = {
    "get_weather": ("city, days", ("What will the weather be in {city} for the next {n} days?",)),
    "set_timer": ("minutes", ("Wake me up in {n} minutes.", "Set a timer for {n} minutes.")),
    "send_message": ("to, text", ('Send {name} the message "{text}".', 'Write "{text}" to {name}.')),
    "book_table": ("city, people", ("Book a table for {n} people in {city}.",)),
    "find_train": (
        "start, goal",
        ("Which trains go from {city} to {other}?", "I need a train from {city} to {other}."),
    ),
    "convert_money": ("amount, currency", ("How much are {n} euros in {currency}?",)),
}


def draw_tools(rng: random.Random, place: int) -> Row:
    """Three functions, a request, and the call of the one that does it."""
    name = list(_TOOLS)[place % len(_TOOLS)]
    offered = [name, *rng.sample([other for other in _TOOLS if other != name], 2)]
    rng.shuffle(offered)
    city, other = rng.sample(CITIES, 2)
    said = {"city": city, "other": other, "n": rng.randint(2, 20), "name": rng.choice(NAMES)}
    said |= {"text": rng.choice(_TEXTS), "currency": rng.choice(["dollars", "pounds", "yen"])}
    arguments = {
        "get_weather": {"city": city, "days": said["n"]},
        "set_timer": {"minutes": said["n"]},
        "send_message": {"to": said["name"], "text": said["text"]},
        "book_table": {"city": city, "people": said["n"]},
        "find_train": {"start": city, "goal": other},
        "convert_money": {"amount": said["n"], "currency": said["currency"]},
    }[name]
    functions = ", ".join(f"{each}({_TOOLS[each][0]})" for each in offered)
    request = rng.choice(_TOOLS[name][1]).format(**said)
    return {
        "text": f"Functions: {functions}\nRequest: {request}",
        "answer": json.dumps({"name": name, "arguments": arguments}),
    }


_TEXTS = ("I am late", "See you soon", "Happy birthday", "The train has left", "Call me tonight", "Dinner is ready")
