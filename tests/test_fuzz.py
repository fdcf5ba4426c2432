"""Damaged files of every format: each case ends in under 10 s and 1 GiB, with exit code 0, 1 or 2 and one message.

tests/fuzz has the generators, and how to see one case again. FUZZ_FIRST=1001 tries other seeds.
"""

from __future__ import annotations

import os
import sys

import pytest
from fuzz import FORMATS
from fuzz.campaign import campaign

FIRST = int(os.environ.get("FUZZ_FIRST", "1"))
CASES, MORE = 500, 20_000
pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="memory is measured in /proc")


def tried(cases: int, workers: int) -> None:
    last = FIRST + cases // len(FORMATS)
    report = campaign([(name, FIRST, last) for name in FORMATS], workers)
    print(f"\nseeds {FIRST} to {last} of each format\n{report}")
    assert not report.faults, str(report)
    assert report.cases >= cases


def test_some_hundred_cases_of_all_formats() -> None:
    tried(CASES, workers=1)


@pytest.mark.full
def test_twenty_thousand_cases() -> None:
    tried(MORE, workers=2)
