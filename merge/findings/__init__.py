"""Results that a run needs before its first step: alignments, router rows, thresholds.

One file a kind, with its class (FINDING) and the module that finds it (FINDER).

Plans hold findings, and tensors whose numbers are found (merge.derive.found). The finder has `find`; its results are
journaled, so that a resumed run does not repeat it, and handed to the reader or to the steps.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Protocol, cast

from merge.plan import Finding

if TYPE_CHECKING:
    from merge.engine.context import Context


class Finder(Protocol):
    BEFORE_CHECKS: bool  # sources cannot be read without it, so it comes before anything looks at them

    def find(self, context: Context, finding: Any, tick: Callable[[], None]) -> None:
        """Finds it, or takes it from the journal, and hands it on."""


def finder(finding: Finding) -> Finder:
    kind = importlib.import_module(f"{__name__}.{finding.finder}")
    return cast(Finder, importlib.import_module(kind.FINDER))
