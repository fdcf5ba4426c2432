"""Calls the finders of a plan's findings; see merge.findings."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Protocol, cast

from merge.engine.context import Context


class Finder(Protocol):
    """What the module that a kind of finding names has."""

    BEFORE_CHECKS: bool  # sources cannot be read without it, so it comes before anything looks at them

    def find(self, context: Context, finding: object, tick: Callable[[], None]) -> None:
        """Finds it, or takes it from the journal, and hands it on."""


def find_all(context: Context, tick: Callable[[], None], before_checks: bool) -> None:
    """What has to be known before the steps; journaled, so that a resume does not repeat it."""
    for finding in context.plan.findings:
        kind = importlib.import_module(f"merge.findings.{finding.finder}")
        finder = cast(Finder, importlib.import_module(kind.FINDER))
        if before_checks == finder.BEFORE_CHECKS:
            finder.find(context, finding, tick)
