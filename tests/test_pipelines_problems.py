"""Pipelines that are wrong: said with their lines, all at once."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from merge.errors import RecipeError
from merge.planning.load import parse_pipeline

GOOD = """\
name: first
merge_method: linear
models:
  - {model: org/b}
  - {model: org/c}
parameters: {weight: 1}
---
name: middle
merge_method: linear
models:
  - {model: first}
  - {model: org/d}
parameters: {weight: 1}
---
merge_method: linear
models:
  - {model: middle}
  - {model: first}
parameters: {weight: 1}
"""
BAD = [
    (
        "{model: first}\n  - {model: org/d",
        "{model: frist}\n  - {model: org/d",
        11,
        '"frist" is neither a directory nor an earlier document; did you mean "first"?',
    ),
    ("org/d", "middle", 12, '"middle" is the name of this document itself; a directory of that name is "./middle"'),
    ("org/b", "middle", 4, '"middle" (line 7) is made from this document, and this one from it: documents cannot form'),
    ("---\nmerge", "---\nname: last\nmerge", None, ""),
    (
        "name: middle\n",
        "",
        7,
        'this document needs a "name", by which later documents use it; only the last one needs none',
    ),
    ("name: middle", "name: first", 8, 'two documents have the name "first"; the first is on line 1'),
    ("org/d", "middel/x/y", 12, 'there is no directory "middel/x/y"'),
    (
        "{model: org/d}",
        "{model: first+org/x}",
        12,
        '"first" is another document, and adapters cannot be added to its result',
    ),
    (
        "{model: org/d}",
        "{model: {model: first, lora: org/x}}",
        12,
        '"first" is another document, and adapters cannot be added',
    ),
    ("name: middle", "name: a/b", 8, '"name" must be usable as the name of a directory'),
    ("  - {model: middle}", "  - {modle: middle}", 17, 'unknown key "modle"'),
    ("parameters: {weight: 1}\n---\nname", "parameters: {weight: 1}\n---\n---\nname", 7, "document 2 is empty"),
]


@pytest.mark.parametrize(("old", "new", "line", "message"), BAD)
def test_what_is_wrong_is_said_with_its_line(old: str, new: str, line: int | None, message: str) -> None:
    assert old in GOOD
    text = GOOD.replace(old, new, 1)
    if line is None:
        assert [stage.name for stage in parse_pipeline(text, "p.yaml").stages][-1] == "last"
        return
    with pytest.raises(RecipeError) as raised:
        parse_pipeline(text, "p.yaml")
    problems = [str(problem) for problem in raised.value.problems]
    assert any(problem.startswith(f"p.yaml:{line}: {message}") for problem in problems), problems


def test_a_later_document_cannot_be_used() -> None:
    text = (
        GOOD.replace("org/d", "aside").rstrip() + "\n---\nname: aside\nmerge_method: linear\nmodels: [{model: org/x}]\n"
    )
    with pytest.raises(RecipeError, match=r'"aside" is made by a later document \(line 21\)') as raised:
        parse_pipeline(text.replace("---\nmerge", "---\nname: end\nmerge"), "p.yaml")
    assert len(raised.value.problems) == 2  # the other: aside itself sums weights that nothing gives


def test_problems_of_all_documents_are_told_at_once() -> None:
    with pytest.raises(RecipeError) as raised:
        parse_pipeline(GOOD.replace("linear", "lineer"), "p.yaml")
    assert [problem.where for problem in raised.value.problems] == ["p.yaml:2", "p.yaml:9", "p.yaml:15"]


def test_a_name_wins_over_a_directory_and_that_is_said(
    tmp_path: Path, make_model: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    for seed, name in enumerate(("b", "c", "first")):
        make_model(tmp_path / "org" / name if name != "first" else tmp_path / name, seed=seed)
    monkeypatch.chdir(tmp_path)
    pipeline = parse_pipeline(GOOD.replace("org/d", "org/b"))
    assert pipeline.stages[1].uses == ("first",)
    assert pipeline.notes == ('"first" is the document of that name, not the directory; that would be "./first"',)
    assert parse_pipeline(GOOD.replace("org/d", "org/b").replace("model: first", "model: ./first")).stages[1].uses == ()
