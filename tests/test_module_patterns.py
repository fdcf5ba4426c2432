"""rank_pattern and alpha_pattern: as PEFT reads them, in linear time for names, and never for long."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from merge.adapter_kinds.patterns import ModulePatterns


def as_peft_has_it(values: Mapping[str, Any], module: str) -> Any:
    return next((value for pattern, value in values.items() if re.match(rf"(.*\.)?({pattern})$", module)), None)


NAMES = st.text("ab1_.", min_size=1, max_size=5)
EXPRESSIONS = st.sampled_from(["a*", ".*b", "^a", "a|b", r"a\.b", "(a|b)1+", r"\d", "a$"])


@given(st.lists(NAMES | EXPRESSIONS, unique=True, max_size=5), st.text("ab1_.", max_size=7))
def test_the_first_pattern_that_fits_an_end_of_the_name_wins(patterns: list[str], module: str) -> None:
    values = {pattern: place for place, pattern in enumerate(patterns)}
    assert ModulePatterns(values).find(module, None) == as_peft_has_it(values, module)


def test_a_pattern_for_each_of_very_many_modules() -> None:
    """Each pattern tried on each module took 10^8 searches here."""
    names = [f"model.layers.{i // 7}.self_attn.proj{i % 7}" for i in range(10_000)]
    patterns = ModulePatterns({name: place for place, name in enumerate(names)})
    assert [patterns.find(f"base.{name}", None) for name in names] == list(range(10_000))


def test_patterns_have_a_time_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("merge.adapter_kinds.patterns.MAX_SECONDS", 0.05)
    endless = ModulePatterns({"((a|aa|a.?)+x?)+b": 1})
    with pytest.raises(ValueError, match="its patterns need more than"):
        endless.find("a" * 60 + "c", None)
    many = ModulePatterns({"(a|aa)+b": 1})
    with pytest.raises(ValueError, match="its patterns need more than"):
        _ = [many.find("a" * 12, None) for _ in range(1_000_000)]


@pytest.mark.parametrize("pattern", ["q_(", "a{99999999999}", "x" * 9000 + "*", "(" * 5000 + ")" * 5000])
def test_what_is_no_regular_expression_is_named(pattern: str) -> None:
    with pytest.raises(ValueError, match=r'^"[^"]{3,150}" is not a regular expression \('):
        ModulePatterns({pattern: 1})
