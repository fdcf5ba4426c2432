"""What planners return: a value, what is wrong, and what is worth saying. Nothing is reported in any other way."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Generic, NamedTuple, TypeVar

from merge.errors import Problem, RecipeError

T = TypeVar("T")


class Planned(NamedTuple, Generic[T]):
    value: T
    problems: tuple[Problem, ...] = ()
    notes: tuple[str, ...] = ()


class Said:
    """Problems and notes of several planners, in the order in which they were taken."""

    def __init__(self) -> None:
        self.problems: list[Problem] = []
        self.notes: list[str] = []

    def take(self, planned: Planned[T]) -> T:
        self.problems += planned.problems
        self.notes += planned.notes
        return planned.value

    def with_value(self, value: T) -> Planned[T]:
        return Planned(value, tuple(self.problems), tuple(self.notes))

    def raise_if_any(self, more: Iterable[Problem] = ()) -> None:
        """Raises RecipeError if there are problems."""
        self.problems += more
        if self.problems:
            raise RecipeError(self.problems)
