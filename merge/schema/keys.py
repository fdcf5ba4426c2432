"""One key of a recipe or config: its type, bounds and help."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Key:
    """One key of a recipe or config.

    Attributes:
        kind: str, int, float, bool, words (a list of strings), table (strings to numbers), or own: a function reads it.
        help: one line, for `--help` and the documents.
        choices: the words that a str, or each of words, may be.
        takes: the kind of value in words, for the documents, where `kind` does not tell.
        page: page of docs/ that explains the key, with its section.
        low, high: inclusive bounds of a number; `above` is an exclusive one.
        noun: the name of the choices in messages, if it is not the key's.
    """

    kind: str = "own"
    help: str = ""
    choices: tuple[str, ...] = ()
    low: float | None = None
    high: float | None = None
    above: float | None = None
    noun: str = ""
    takes: str = ""
    page: str = ""

    @property
    def span(self) -> str:
        """The bounds in words: "of at least 1", "from 0 to 1", "above 0 and at most 0.9"."""
        if self.low is not None and self.high is not None:
            return f"from {_plain(self.low)} to {_plain(self.high)}"
        words = (("of at least", self.low), ("above", self.above), ("at most", self.high))
        return " and ".join(f"{word} {_plain(limit)}" for word, limit in words if limit is not None)

    def holds(self, value: float) -> bool:
        """Whether a number is finite and within the bounds."""
        return (
            (isinstance(value, int) or math.isfinite(value))
            and (self.low is None or value >= self.low)
            and (self.high is None or value <= self.high)
            and (self.above is None or value > self.above)
        )


def _plain(limit: float) -> str:
    return str(limit) if isinstance(limit, int) else f"{limit:g}"
