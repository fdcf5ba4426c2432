"""What holds for every architecture: tests/architectures.py has the models, tests/contract.py the promises."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from architectures import names
from contract import CHECKS, Family

from merge.errors import RecipeError

ROOT = Path(__file__).resolve().parent.parent
# What is refused, with a word of the reason.
REFUSED = {("albert", "stack"): "which cannot be stacked"}


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    from transformers.utils import logging

    level = logging.get_verbosity()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    yield
    logging.set_verbosity(level)
    logging.enable_progress_bar()


def test_the_page_has_every_architecture_and_promise() -> None:
    """Written by benchmarks/architecture_contract.py."""
    lines = (ROOT / "docs" / "architectures.md").read_text(encoding="utf-8").splitlines()
    rows = [line.strip("| ").split(" | ") for line in lines if line.startswith("| ")]
    assert rows[0][1:] == [*CHECKS, "layers"]
    assert tuple(row[0] for row in rows[1:]) == names()
    refused = {
        (row[0], promise) for row in rows[1:] for promise, kept in zip(CHECKS, row[2:-1], strict=True) if kept != "kept"
    }
    assert refused == set(REFUSED)


@pytest.mark.parametrize("name", names())
def test_every_promise_is_kept(name: str, tmp_path: Path) -> None:
    family = Family(name, tmp_path)
    for promise, check in CHECKS.items():
        if (reason := REFUSED.get((name, promise))) is None:
            check(family)
        else:
            with pytest.raises(RecipeError, match=reason):
                check(family)
