"""The only reader of foreign JSON: bounded in memory, depth and digits, and linear in the text's length.

Python's own reader makes 50 bytes of objects of one byte of `[],[],[]`, and gives no say before they are made; so what
the text may become is estimated from its punctuation first. A number of more than MAX_DIGITS digits is refused: Python
converts long ones in quadratic time, and writes none of more than 4,300 digits.
"""

from __future__ import annotations

import json
import re
from typing import Any, TypeVar

from merge.quoting import clipped

MAX_MEMORY = 3 << 27  # bytes, 384 MiB: the tokenizers with most tokens (900,000) need two thirds of that
MAX_DEPTH = 64
MAX_DIGITS = 300  # still a float64
# Bytes that CPython needs at most, as measured: for an object, a list, a name in an object, and any value in its place.
_OBJECT, _LIST, _NAME, _VALUE = 200, 100, 150, 64
_MANY_DIGITS = re.compile(rf"\d{{{MAX_DIGITS + 1}}}")
_HALF_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")
T = TypeVar("T")


class JSONTextError(ValueError):
    """What is wrong with a text, to be put behind the name of its file: "is not valid JSON (...)"."""


def parse_json(text: str | bytes, *, unique: bool = False, is_text: bool = False, max_memory: int = MAX_MEMORY) -> Any:
    """A JSON text -> plain Python values.

    Args:
        text: bytes are UTF-8.
        unique: a name that stands twice in an object is an error; else the last one wins.
        is_text: half a surrogate pair in a string is an error: JSON can spell it, and no file can be written with it.
        max_memory: estimated bytes of the values.

    Raises:
        JSONTextError: not JSON, or beyond the bounds.
    """
    try:
        if isinstance(text, bytes):
            text = text.decode("utf-8")
        if (memory := _estimate(text)) > max_memory:
            raise JSONTextError(
                f"holds so many values that they take about {memory >> 20:,} MiB of memory; at most "
                f"{max_memory >> 20:,} MiB are allowed"
            )
        long_numbers = _whole if _MANY_DIGITS.search(text) else None  # a call for each number takes its time
        data = json.loads(text, object_pairs_hook=_unique if unique else None, parse_int=long_numbers)
    except JSONTextError:
        raise
    except RecursionError:
        raise JSONTextError("is not valid JSON (it nests without end)") from None
    except ValueError as error:
        raise JSONTextError(f"is not valid JSON ({error})") from None
    if _is_deep(data):
        raise JSONTextError(f"nests deeper than {MAX_DEPTH} levels")
    if is_text:
        _check_is_text(text, data)
    return data


def parse_known(text: str, kind: type[T]) -> T | None:
    """A JSON text of a known form, decoded at once; None if it has another form, or is beyond the bounds.

    A tenth of the time of `parse_json`. Of a name that stands twice the last one wins, and keys that `kind` does not
    have are passed over: the caller counts what it must not miss.
    """
    import msgspec  # here: `merge --help` does without

    if len(text) > MAX_MEMORY // (_OBJECT + 1) and _estimate(text) > MAX_MEMORY:
        return None
    try:
        return msgspec.json.decode(text, type=kind)
    except (ValueError, RecursionError):
        return None


def _check_is_text(text: str, data: Any) -> None:
    if _HALF_SURROGATE.search(text):
        try:
            json.dumps(data, ensure_ascii=False).encode()
        except UnicodeEncodeError as error:
            raise JSONTextError(f"is not valid JSON ({error})") from None


def _estimate(text: str) -> int:
    """Bytes that the parsed text takes, from above: punctuation in strings is counted too."""
    costs = (("{", _OBJECT), ("[", _LIST), (":", _NAME), (",", _VALUE))
    return len(text) + sum(cost * text.count(mark) for mark, cost in costs)


def _whole(digits: str) -> int:
    if len(digits) > MAX_DIGITS:
        raise JSONTextError(f"holds a number of {len(digits):,} digits; at most {MAX_DIGITS} are allowed")
    return int(digits)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """For object_pairs_hook: two values under one name are ambiguous, so an error."""
    result = dict(pairs)
    seen: set[str] = set()
    for name, _ in pairs if len(result) < len(pairs) else ():
        if name in seen:
            raise JSONTextError(f'is not valid JSON (duplicate: the name "{clipped(name)}" is there twice)')
        seen.add(name)
    return result


def _is_deep(data: Any) -> bool:
    """Whether it has more than MAX_DEPTH levels of objects and lists."""
    level = [data] if isinstance(data, (dict, list)) else []
    for _ in range(MAX_DEPTH):
        level = [
            child
            for item in level
            for child in (item.values() if isinstance(item, dict) else item)
            if isinstance(child, (dict, list))
        ]
    return bool(level)
