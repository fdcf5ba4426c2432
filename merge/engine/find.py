"""Calls the finders of a plan's findings; see merge.findings."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Protocol, cast

from merge.engine.context import Context


class Finder(Protocol):
    """The functions of a finder module."""

    BEFORE_CHECKS: bool  # sources cannot be read without this finding, so it comes first

    def find(self, context: Context, finding: object, tick: Callable[[], None]) -> None:
        """Computes the finding, or takes it from the journal, and passes it on."""


def find_all(context: Context, tick: Callable[[], None], before_checks: bool) -> None:
    """Computes a plan's findings before the steps. They are journaled, so a resumed run does not repeat them."""
    for finding in context.plan.findings:
        kind = importlib.import_module(f"merge.findings.{finding.finder}")
        finder = cast(Finder, importlib.import_module(kind.FINDER))
        if before_checks == finder.BEFORE_CHECKS:
            finder.find(context, finding, tick)
