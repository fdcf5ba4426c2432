"""Values as JSON that tells a list from a tuple: what a function returned, on its way to the process that judges it.

A list is ["list", item, ...], a tuple ["tuple", ...], a dictionary ["dict", [key, value], ...], a set ["set", ...],
bytes ["bytes", hexadecimal digits]; dictionaries and sets are in the order of their JSON. The judge compares this form
and never builds the values: there are no objects of the program's classes, and no hashes that it could have chosen.
"""

from __future__ import annotations

import json

TOLERANCE = 1e-9  # of floats, relative above 1


def encode(value: object) -> object:
    """Raises TypeError for what is not made of Python's literals."""
    if value is None or isinstance(value, (bool, str)):
        return value
    if isinstance(value, int):
        return int(value)
    if isinstance(value, float):
        return float(value)
    if isinstance(value, (list, tuple)):
        return ["list" if isinstance(value, list) else "tuple", *map(encode, value)]
    if isinstance(value, dict):
        return ["dict", *sorted(([encode(key), encode(each)] for key, each in value.items()), key=json.dumps)]
    if isinstance(value, (set, frozenset)):
        return ["set", *sorted(map(encode, value), key=json.dumps)]
    if isinstance(value, (bytes, bytearray)):
        return ["bytes", value.hex()]
    raise TypeError(f"{type(value).__name__}: is not made of Python's literals")


def same(expected: object, found: object) -> bool:
    """Whether two encoded values are equal as Python's are; booleans and None are equal to themselves only."""
    if isinstance(expected, list):
        return (
            isinstance(found, list)
            and len(expected) == len(found)
            and all(same(one, other) for one, other in zip(expected, found, strict=True))
        )
    if expected is None or isinstance(expected, bool):
        return expected is found
    if isinstance(expected, float) and isinstance(found, float):
        return abs(expected - found) <= TOLERANCE * max(1.0, abs(expected))
    return bool(expected == found)
