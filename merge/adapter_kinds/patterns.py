"""PEFT's patterns of module names (rank_pattern, alpha_pattern) -> the value of a module, in bounded time.

PEFT tries the patterns in their order, and the first one wins for which re.match(rf"(.*\\.)?({pattern})$", module).
Here names, as nearly all patterns are, are looked up: some adapters have one for each of thousands of modules. What is
a regular expression is one that somebody else wrote, so it has a time limit, which `re` does not offer.

Source: peft 0.21.2, utils/other.py (get_pattern_key).
"""

from __future__ import annotations

import re
import time
from collections.abc import Iterator, Mapping
from typing import Any

from merge.limits import MAX_NAME
from merge.quoting import clipped, quoted

MAX_SECONDS = 2.0  # of the processor, for all modules
_NAME = re.compile(r"[\w.-]+", re.ASCII)


class ModulePatterns:
    """pattern -> value; raises ValueError for a pattern that is not a regular expression."""

    def __init__(self, values: Mapping[str, object]) -> None:
        self._values = list(values.values())
        self._names: dict[str, int] = {}  # name -> its place in the order
        self._dots: dict[int, dict[tuple[int, ...], None]] = {}  # length of a name -> where its dots are
        self._expressions: list[tuple[int, Any]] = []
        self._seconds = 0.0
        for place, pattern in enumerate(values):
            if _NAME.fullmatch(pattern):
                self._names[pattern] = place
                dots = tuple(i for i, letter in enumerate(pattern) if letter == ".")
                self._dots.setdefault(len(pattern), {})[dots] = None
            else:
                self._expressions.append((place, _compiled(pattern)))

    def find(self, module: str, default: object) -> object:
        """The module's value. Raises ValueError once all searches together took MAX_SECONDS."""
        try:
            return self._find(module, default)
        except TimeoutError:
            raise ValueError(
                f"its patterns need more than {MAX_SECONDS:g} s to be matched; write names of modules in place of "
                "regular expressions"
            ) from None

    def _find(self, module: str, default: object) -> object:
        began = time.thread_time() - self._seconds
        best = len(self._values)
        for name in self._readings(module):
            best = min(best, self._names.get(name, best))
            if time.thread_time() - began > MAX_SECONDS:
                raise TimeoutError
        for place, expression in self._expressions:
            left = MAX_SECONDS - (time.thread_time() - began)
            if place > best:
                break
            if left <= 0:
                raise TimeoutError
            if expression.match(module, timeout=left):
                best = place
        self._seconds = time.thread_time() - began
        return self._values[best] if best < len(self._values) else default

    def _readings(self, module: str) -> Iterator[str]:
        """The names that fit an end of the module's name. A dot in a name stands for any letter."""
        start = 0
        while True:
            end = module[start:]
            for dots in self._dots.get(len(end), ()):
                letters = list(end)
                for i in dots:
                    letters[i] = "."
                yield "".join(letters)
            start = module.find(".", start) + 1
            if not start:
                return


_kept: list[tuple[Mapping[str, Any], ModulePatterns]] = []


def patterns_of(values: Mapping[str, object]) -> ModulePatterns:
    """The patterns of a config. They are needed for each module, so the last four are cached."""
    found = next((patterns for kept, patterns in _kept if kept is values), None)
    if found is None:
        found = ModulePatterns(values)
        _kept[:] = [(values, found), *_kept[:3]]
    return found


def _compiled(pattern: str) -> object:
    import regex  # here: merges without adapters start sooner

    try:
        if len(pattern) > MAX_NAME:
            raise ValueError(f"{len(pattern):,} characters, at most {MAX_NAME:,} are read")
        re.compile(pattern)  # as PEFT reads it
        return regex.compile(rf"(.*\.)?({pattern})$")
    except (re.error, regex.error, ValueError, OverflowError, RecursionError) as error:
        raise ValueError(f'"{clipped(pattern)}" is not a regular expression ({error})') from None


def by_pattern(config: Mapping[str, object], key: str, module: str, default: str) -> float:
    """A module's own number: patterns are tried in their order, and the first that matches its end wins.

    Args:
        key: of the patterns; `default`: of the number of all other modules.

    Raises:
        ValueError: with the short cause.
    """
    values = config.get(key) or {}
    if not isinstance(values, Mapping):
        raise ValueError(f"{key}: expected module names with a number each, found {quoted(values, 60)}")
    try:
        found: Any = patterns_of(values).find(module, config.get(default))
    except ValueError as error:
        raise ValueError(f"{key}: {error}") from None
    if not is_number(found) or (default == "r" and not found > 0):
        raise ValueError(f"{key}: expected a number for {module}, found {quoted(found, 40)}")
    number: float = found
    return number


def is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < 1e30
