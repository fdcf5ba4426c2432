"""Quotes foreign text in messages: names and values, shortened, at a cost independent of their size.

`quoted` for a value of any kind, `clipped` for a name, `some` for the first of many, `counted` for their number.
`bounded` is what the message of every error goes through, so that one that quotes a name whole is short all the same.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Sequence
from itertools import islice

_NAME = 120  # characters of a name
_STRING = 60  # characters of a string within a value
_ITEMS, _LEVELS = 6, 3  # of lists and dictionaries
_MESSAGE = 8_000  # characters of a message
# No file name has so many letters, so paths stay whole.
_LONG_WORD = re.compile(r"[^\s/\\]{301,}")


def quoted(value: object, most: int = 100) -> str:
    """A value as Python writes it, cut to `most` characters: `'bfloat16'`, `[4096, 4096]`, `[0, 0, 0, ...]`."""
    text = _written(value, _LEVELS)
    return text if len(text) <= most else f"{text[:most]}..."


def clipped(text: str, most: int = _NAME) -> str:
    """A name or text as it is; of a long one the beginning and its length."""
    return text if len(text) <= most else f"{text[:most]}... ({len(text):,} characters)"


def excerpt(text: str, most: int = 300) -> str:
    """The beginning of what somebody else wrote, up to the end of a word."""
    if len(text) <= most:
        return text
    end = text.rfind(" ", most // 2, most)
    return f"{text[: end if end > 0 else most].rstrip()} ..."


def some(names: Sequence[str], limit: int = 3) -> str:
    """ "a, b, c and 7 more" """
    shown = ", ".join(name if name.startswith(os.sep) else clipped(name) for name in names[:limit])  # paths are whole
    return shown if len(names) <= limit else f"{shown} and {len(names) - limit:,} more"


def counted(n: int, noun: str, plural: str | None = None) -> str:
    """ "1 document", "1,200 documents" """
    return f"{n:,} {noun if n == 1 else plural or f'{noun}s'}"


def bounded(message: str) -> str:
    """A message with its endless words cut, and cut itself where it is still too long."""
    if len(message) <= 300:
        return message
    message = _LONG_WORD.sub(lambda word: clipped(word[0]), message)
    return message if len(message) <= _MESSAGE else f"{message[:_MESSAGE]}... ({len(message):,} characters)"


def _written(value: object, levels: int) -> str:
    """repr() of the first items of the first levels: a tuple of itself twice, 45 levels deep, has 2^45 parts."""
    if isinstance(value, (str, bytes)):
        return repr(value) if len(value) <= _STRING else f"{value[:_STRING]!r}..."
    if isinstance(value, int) and value.bit_length() > 256:  # long numbers take quadratic time, and then are refused
        return f"a number of {value.bit_length():,} bits"
    if value is None or isinstance(value, (bool, int, float)):
        return repr(value)
    if isinstance(value, dict):
        pairs = (f"{_written(key, 0)}: {_written(item, levels - 1)}" for key, item in value.items())
        return f"{{{_first(pairs, len(value), levels)}}}"
    if isinstance(value, (list, tuple)):
        items = _first((_written(item, levels - 1) for item in value), len(value), levels)
        return f"[{items}]" if isinstance(value, list) else f"({items},)" if len(value) == 1 else f"({items})"
    return f"<{type(value).__name__}>"


def _first(items: Iterable[str], count: int, levels: int) -> str:
    shown = list(islice(items, _ITEMS if levels > 0 else 0))
    return ", ".join(shown if len(shown) == count else [*shown, "..."])
