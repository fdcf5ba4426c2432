"""Suggestions for unknown names."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence

MOST = 3  # names that a message suggests
_MANY = 20
_LONGEST = 100  # characters; no name is longer


def suggest(word: str, names: Iterable[str], listed_by: str | None = None) -> str:
    """`did you mean "density"?`, or `known: a, b, c`; or the command that lists them, if there are many."""
    names = list(names)
    near = nearest(word, names)
    if near or listed_by is None or len(names) < _MANY:
        return f'did you mean "{near}"?' if near else f"known: {', '.join(names)}"
    return f"`{listed_by}` lists them all"


def nearest(word: str, names: Iterable[str]) -> str | None:
    """The name that was probably meant."""
    return next(iter(alike(word, names)), None)


def alike(word: str, names: Iterable[str]) -> list[str]:
    """The names that were probably meant: with swapped letters, else with this beginning, else the most similar."""
    if len(word) > _LONGEST:
        return []
    names, word = list(names), _fold(word)
    for same in (lambda name: sorted(name) == sorted(word), lambda name: len(word) > 2 and name.startswith(word)):
        if found := [name for name in names if same(_fold(name))]:
            return found[:MOST]
    ratios = {name: difflib.SequenceMatcher(None, _fold(name), word).ratio() for name in names}
    best = max(ratios.values(), default=0.0)
    near = [name for name in names if ratios[name] >= max(0.6, best - 0.05)]
    return sorted(near, key=lambda name: -ratios[name])[:MOST]


def _fold(name: str) -> str:
    return name.lower().replace("-", "_")


def one_of(words: Sequence[str], last: str = "or") -> str:
    """`a, b or c`"""
    return f" {last} ".join(filter(None, (", ".join(words[:-1]), words[-1])))
