"""Every error this package raises on purpose.

    MergeError                 exit code 1: the run failed
    ├── RecipeError            exit code 2: the recipe, or what it asks of these models, is wrong; holds every Problem
    ├── UsageError             exit code 2: a command-line value is wrong
    ├── CheckpointError        a model directory or file is damaged, missing or not supported
    ├── SourceChanged          a source file changed while it was being read
    │   └── StaleWork          unfinished work was made from other sources; it can only be discarded
    ├── NumbersError           non-finite values or overflow that the recipe does not allow
    └── OutputError            the result cannot be written, or an output does not match its manifest

A message names the file, the place, what was expected, what was found, and what to do.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from merge.quoting import bounded, excerpt

_CONTROL = re.compile(r"\x1b\[[0-9;]*m")  # colours


class MergeError(Exception):
    """Root of the tree; the command line prints its message, never a traceback."""

    exit_code = 1

    def __init__(self, message: str) -> None:
        super().__init__(bounded(message))


@dataclass(frozen=True)
class Problem:
    """One problem of a recipe. `where` is "file.yaml:7" or a tensor's name; `hint` says what to do."""

    message: str
    where: str | None = None
    hint: str | None = None

    def __post_init__(self) -> None:
        for part in ("message", "where", "hint"):
            if (text := getattr(self, part)) is not None:
                object.__setattr__(self, part, bounded(text))

    def __str__(self) -> str:
        place = f"{self.where}: " if self.where else ""
        return f"{place}{self.message}" + (f" {self.hint}" if self.hint else "")


class RecipeError(MergeError):
    """The recipe, or what it asks of these models, is wrong. All problems at once, in the recipe's order.

    `advice`: lines about all of them, printed last.
    """

    exit_code = 2

    def __init__(self, problems: Sequence[Problem] | Problem | str, advice: Sequence[str] = ()) -> None:
        if isinstance(problems, str):
            problems = Problem(problems)
        self.problems = (problems,) if isinstance(problems, Problem) else tuple(problems)
        self.advice = tuple(map(bounded, advice))
        Exception.__init__(self, "\n".join([*folded(self.problems), *self.advice]))  # each of them is bounded


_LINE = re.compile(r"(:|^line )\d+$")  # of a recipe: each is named
_SHAPE = re.compile(r"\[[\d, ]*\]")


def folded(problems: Sequence[Problem]) -> list[str]:
    """A line for each problem; one that three or more tensors share, shapes aside, is one line with a count."""
    alike: dict[tuple[str | None, ...], list[Problem]] = {}
    for problem in problems:
        line = problem.where if _LINE.search(problem.where or ":0") else None
        alike.setdefault((_SHAPE.sub("[]", problem.message), problem.hint, line), []).append(problem)
    lines: list[str] = []
    for same in alike.values():
        if len(same) < 3:
            lines += map(str, same)
            continue
        places = f"{same[0].where}, {same[1].where} and {len(same) - 2:,} more"
        lines.append(f"{places}: {replace(same[0], where=None)}")
    return lines


class UsageError(MergeError):
    exit_code = 2


class CheckpointError(MergeError):
    pass


class SourceChanged(MergeError):
    pass


class StaleWork(SourceChanged):
    pass


class NumbersError(MergeError):
    pass


class OutputError(MergeError):
    pass


def kept_by(error: BaseException, place: Path) -> None:
    """Records that finished work lies there, for the message after an interruption."""
    error.__dict__.setdefault("kept", []).append(place)


def is_kept(error: BaseException) -> bool:
    """Whether an interrupted command left anything that the same command resumes with."""
    return any(place.exists() for place in getattr(error, "kept", ()))


def first_line(error: BaseException) -> str:
    """The first line with words of a library's error, for use in our message."""
    lines = _CONTROL.sub("", str(error)).splitlines()
    return next((excerpt(line.strip()) for line in lines if any(map(str.isalnum, line))), "no message")
