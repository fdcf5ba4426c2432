"""Model cards that keep every other byte, and a page that fetches nothing and parses."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path

import pytest
import verdicts as made
import yaml

from eval.card import write_card
from eval.compare import Comparison, compare
from eval.html import page
from eval.plots import tick_step
from eval.results import ScorePart
from eval.tables import as_data, as_markdown
from eval.tasks.leaderboards import combine
from merge import build_plan, parse_recipe, run_plan, verify_output
from merge.errors import OutputError, UsageError
from merge.output.card import with_evaluation, without_evaluation

SCORES = {"a": (90, 20), "b": (30, 80), "merge": (80, 85)}


@pytest.fixture
def comparison() -> Comparison:
    return compare(made.family(SCORES))


@pytest.fixture
def merged(tmp_path: Path, make_model: Callable[..., Path]) -> Path:
    models = [make_model(tmp_path / name, seed=seed) for seed, name in enumerate("ab")]
    lines = "".join(f"  - model: {path}\n" for path in models)
    run_plan(
        build_plan(parse_recipe(f"merge_method: linear\nmodels:\n{lines}parameters: {{weight: 1}}\n")), tmp_path / "out"
    )
    return tmp_path / "out"


def test_a_card_is_verified_without_its_evaluation(merged: Path, comparison: Comparison) -> None:
    before = (merged / "README.md").read_bytes()
    manifest = (merged / "merge_manifest.json").read_bytes()
    write_card(merged, comparison)
    once = (merged / "README.md").read_bytes()
    assert b"| merge | 80.0" in once
    assert verify_output(merged).problems == ()
    write_card(merged, comparison)
    assert (merged / "README.md").read_bytes() == once
    write_card(merged, compare(made.family(SCORES | {"merge": (10, 11)})))
    assert b"| merge | 80.0" not in (merged / "README.md").read_bytes()
    assert without_evaluation((merged / "README.md").read_text()).encode() == before
    assert (merged / "merge_manifest.json").read_bytes() == manifest
    (merged / "README.md").write_bytes(once.replace(b"A merge of", b"A merger of"))
    assert verify_output(merged).problems == (f"{merged / 'README.md'}: changed since the merge",)


def test_a_card_of_another_system_keeps_its_line_ends(tmp_path: Path, comparison: Comparison) -> None:
    before = b"---\r\nlicense: mit\r\n---\r\n\r\n# Hi\r\n"
    (tmp_path / "README.md").write_bytes(before)
    write_card(tmp_path, comparison)
    once = (tmp_path / "README.md").read_bytes()
    assert once.count(b"\n") == once.count(b"\r\n") > 20
    assert b"model-index:" in once.split(b"---")[1]
    write_card(tmp_path, comparison)
    assert (tmp_path / "README.md").read_bytes() == once
    assert without_evaluation(once.decode()).encode() == before


def test_a_sample_of_a_leaderboard_is_marked_everywhere(tmp_path: Path) -> None:
    models = []
    for name in ("a", "merge"):
        task = made.task("raw", [1.0, 0.0, 1.0])
        column = combine("ARC", [ScorePart("raw", "acc,none")], {"raw": task})
        models.append(made.model(name, [column, dataclasses.replace(task, group="none")], ["a"] * (name == "merge")))
    for limit, said in ((None, False), (3, True)):
        results = dataclasses.replace(made.results(models), settings={"limit": limit})
        found = compare(results)
        note = "ARC: on a sample of 3 items a task; not a leaderboard score."
        write_card(tmp_path, found)
        card = (tmp_path / "README.md").read_text(encoding="utf-8")
        for text in (as_markdown(found), page(found), json.dumps(as_data(found)), results.to_json(), card):
            assert (note in text) == said
        (index,) = yaml.safe_load(card.split("---\n")[1])["model-index"]
        (entry,) = index["results"]
        assert entry["dataset"]["name"] == ("ARC (sample, no leaderboard score)" if said else "ARC")


def test_the_head_has_the_hubs_metadata(merged: Path, comparison: Comparison) -> None:
    text = write_card(merged, comparison).read_text(encoding="utf-8")
    head = yaml.safe_load(text.split("---\n")[1])
    assert head["library_name"] == "transformers"
    (entry,) = head["model-index"]
    assert entry["name"] == "merge"
    assert [each["metrics"][0]["value"] for each in entry["results"]] == [0.8, 0.85]
    assert entry["results"][0]["dataset"] == {"name": "math", "type": "math"}


@pytest.mark.parametrize(
    "before",
    [
        "# Mine\n",
        "---\nlicense: mit\n---\n\n# Mine\n\n| a | table |\n|---|---|\n",
        "---\nmodel-index:\n- name: own\n---\n# Mine\n",
        "text with --- and <!-- comments -->\n",
        "# Windows\r\n\r\nlines\r\n",
        "",
    ],
)
def test_other_text_stays_to_the_byte(tmp_path: Path, before: str, comparison: Comparison) -> None:
    (tmp_path / "README.md").write_bytes(before.encode())
    write_card(tmp_path, comparison)
    after = (tmp_path / "README.md").read_bytes().decode()
    assert without_evaluation(after) == before
    assert after.count("## Evaluation") == 1
    if "model-index" in before:
        assert yaml.safe_load(after.split("---\n")[1]) == {"model-index": [{"name": "own"}]}


def test_text_after_the_section_stays(comparison: Comparison) -> None:
    card = with_evaluation("# Mine\n", "", "one\n") + "\nWritten later.\n"
    assert without_evaluation(card) == "# Mine\n\nWritten later.\n"
    again = with_evaluation(card, "", "two\n")
    assert "Written later." in again
    assert "one" not in again


def test_a_card_is_made_where_there_is_none_and_bad_ones_are_refused(tmp_path: Path, comparison: Comparison) -> None:
    assert write_card(tmp_path, comparison).read_text(encoding="utf-8").startswith("---\nlibrary_name: transformers\n")
    (tmp_path / "README.md").write_bytes(b"\xff\xfe")
    with pytest.raises(OutputError, match=r"README.md: cannot be read as UTF-8"):
        write_card(tmp_path, comparison)
    assert (tmp_path / "README.md").read_bytes() == b"\xff\xfe"
    with pytest.raises(UsageError, match="there is no such directory"):
        write_card(tmp_path / "none", comparison)


class Checker(HTMLParser):
    """Every tag closed in order; every attribute and text collected."""

    VOID = ("meta", "br", "link", "img", "input", "hr")

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str]] = []
        self.text = ""

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(name, value or "") for name, value in attributes]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(name, value or "") for name, value in attributes]

    def handle_endtag(self, tag: str) -> None:
        assert self.open
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def parsed(text: str) -> Checker:
    checker = Checker()
    checker.feed(text)
    checker.close()
    assert checker.open == []
    return checker


def pages() -> dict[str, str]:
    two = made.family({"a": (90, 20), "b": (30, 80)})
    loss = [
        made.model(f"t{i}", [made.task("loss", [(1.0 + i % 2, 1.0)], "bits_per_byte", better=False)]) for i in range(3)
    ]
    even = made.family({"a": (50, 50), "merge": (50, 50)})
    return {
        "merge": page(compare(made.family(SCORES))),
        "models": page(Comparison(two)),
        "path": page(Comparison(made.results(loss, [0.0, 0.5, 1.0]))),
        "one": page(Comparison(dataclasses.replace(two, models=two.models[:1]))),
        "even": page(compare(even)),
    }


@pytest.mark.parametrize("kind", ["merge", "models", "path", "one", "even"])
def test_the_page_parses_and_fetches_nothing(kind: str) -> None:
    text = pages()[kind]
    found = parsed(text)
    assert not {"script", "link", "img", "iframe", "object", "embed", "base"} & set(found.tags)
    assert not [name for name, _ in found.attributes if name in ("src", "href", "xlink:href", "action", "srcset")]
    assert not re.search(r"https?:|//[a-z]|url\(|@import", text)
    assert ("content", "default-src 'none'; style-src 'unsafe-inline'") in found.attributes
    assert found.tags.count("figure") == [v for n, v in found.attributes if n == "role"].count("img") > 0
    assert found.tags.count("table") >= 2
    assert "nan" not in re.sub(r"[a-z]*nan[a-z]+|[a-z]+nan", "", text.lower())


def test_names_and_texts_are_no_markup() -> None:
    evil = '<script>alert("1")</script>&amp;'
    found = made.family({evil: (90, 20), "merge": (80, 85)})
    questions = {"math": {str(i): (evil, evil) for i in range(100)}}
    text = page(compare(dataclasses.replace(found, questions=questions)))
    assert "<script" not in text
    assert parsed(text).text.count(evil) > 10


def test_the_page_shows_what_was_gained_and_lost(comparison: Comparison) -> None:
    """The merge's right answers on math are the first 80, the best parent's the first 90: 10 are lost, none gained."""
    text = parsed(page(comparison)).text
    assert "Items lost against a" in text
    assert "Items gained against a" not in text
    assert "Items gained against b" in text
    assert "question 80?" in text
    assert "question 85?" in text
    assert "question 86?" not in text  # six of them


def test_equal_results_give_equal_pages() -> None:
    assert pages() == pages()


@pytest.mark.parametrize("span", [1e-9, 0.003, 0.7, 1.0, 9.99, 5e6])
def test_ticks_are_few_and_round(span: float) -> None:
    assert 2.9 <= span / tick_step(span) <= 6.0001
