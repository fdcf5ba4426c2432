"""merge analyse, the command: tables, JSON, CSV, the page, the recipe, and what it refuses."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from analysed import analysis_of, base_tensors, moved, noise, write_model
from conftest import Output

from merge.show.analysis_page import analysis_page
from merge.tools.analyse.tables import positions

Call = Callable[..., Output]
BASE = base_tensors()


@pytest.fixture
def family(tmp_path: Path) -> Path:
    """base, and a to c; a and b have half of their deltas in common."""
    write_model(tmp_path / "base", BASE)
    common = moved(BASE, noise(9))
    for seed, (name, start) in enumerate((("a", common), ("b", common), ("c", BASE)), 1):
        write_model(tmp_path / name, moved(start, noise(seed)))
    return tmp_path


def test_tables_have_every_model_pair_and_role(family: Path, call_cli: Call) -> None:
    done = call_cli(["analyse", "base", "a", "b", "c"])
    assert (done.code, done.stderr) == (0, "")
    starts = [line.split("  ")[0].strip() for line in done.stdout.splitlines()]
    for start in (
        "model",
        "a",
        "b",
        "c",
        "a, b",
        "a, c",
        "b, c",
        "embedding",
        "gate",
        "norm",
        "head",
        "method",
        "weight",
    ):
        assert start in starts
    assert "a, b  +0.5" in done.stdout


def test_one_model_alone_is_measured(family: Path, call_cli: Call) -> None:
    done = call_cli(["analyse", "base", "a", "--html", "page.html"])
    assert (done.code, done.stderr) == (0, "")
    assert "cosine" not in done.stdout
    assert "name more fine-tunes of this base" in done.stdout
    assert "<h2>Pairs</h2>" not in (family / "page.html").read_text(encoding="utf-8")


def test_json_and_csv_have_the_same_numbers(family: Path, call_cli: Call) -> None:
    done = call_cli(["analyse", "base", "a", "b", "--json", "--csv", "measures.csv"])
    data = json.loads(done.stdout)
    with (family / "measures.csv").open(newline="") as lines:
        rows = list(csv.DictReader(lines))
    name = "model.layers.1.mlp.up_proj.weight"
    tensor = next(each for each in data["tensors"] if each["name"] == name)
    mine = {(row["measure"], row["at"], row["a"], row["b"]): row for row in rows if row["tensor"] == name}
    assert {(row["role"], row["layer"]) for row in mine.values()} == {("up", "1")}
    assert float(mine["cosine", "", "a", "b"]["value"]) == tensor["pairs"][0]["cosine"]
    assert float(mine["conflict", "0.2", "a", "b"]["value"]) == tensor["pairs"][0]["conflict"][2]
    assert float(mine["relative", "", "b", ""]["value"]) == tensor["models"][1]["relative"]
    assert float(mine["energy_of_rank", "4", "a", ""]["value"]) == tensor["spectra"]["models"][0]["energy"][2]
    assert float(mine["left", "", "a", "b"]["value"]) == tensor["spectra"]["left"][0]
    assert data["models"] == ["a", "b"]
    assert len(data["cells"]) == 2 * 8  # seven matrices and the norms in each of two layers
    assert {each["role"] for each in data["roles"]} == {row["role"] for row in rows}


def test_the_suggested_recipe_runs(family: Path, call_cli: Call) -> None:
    done = call_cli(["analyse", "base", "a", "c", "--recipe", "suggested.yaml", "--quiet"])
    assert done.code == 0
    done = call_cli(["run", "suggested.yaml", "-o", "out", "--quiet"])
    assert done.code == 0, done.stderr
    assert (family / "out" / "model.safetensors").exists()


class Page(HTMLParser):
    """What a page is made of; fails at tags that are not closed in order."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.count: dict[str, int] = {}
        self.captions: list[str] = []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        values = dict(attributes)
        assert "src" not in values
        assert "href" not in values
        assert tag != "script"
        kind = f"{tag}.{values['class']}" if tag == "table" and "class" in values else tag
        self.count[kind] = self.count.get(kind, 0) + 1
        if tag not in ("meta", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] == "figcaption":
            self.captions.append(data.strip())


def test_the_page_holds_every_figure_and_fetches_nothing(family: Path, call_cli: Call) -> None:
    done = call_cli(["analyse", "base", "a", "b", "c", "--html", "page.html", "--quiet"])
    assert done.code == 0
    page = Page((family / "page.html").read_text(encoding="utf-8"))
    of_models = [f"|d|/|b| of {name}" for name in "abc"]
    others = ["Cosine of deltas", "Sign conflict", "Sign conflict", "Cancelled magnitude", "Cancelled magnitude"]
    more = [
        "Same entries",
        "Shared left directions",
        "Shared right directions",
        "Interference",
        "Lost in bfloat16",
        "Effective rank",
    ]
    assert page.captions == ["Map of the models", *of_models, *others, *more]
    assert page.count["table.heat"] == len(page.captions) - 1
    assert page.count["circle"] == 3
    assert page.count["pre"] == 1


def test_names_on_the_page_are_text(tmp_path: Path) -> None:
    base = write_model(tmp_path / "base", BASE)
    odd = write_model(tmp_path / "<b>&", moved(BASE, noise(1)))
    text = analysis_page(analysis_of(base, odd, matrices=0))
    Page(text)
    assert "<b>&" not in text
    assert "&lt;b&gt;&amp;" in text


def test_the_map_keeps_the_distances_of_three_models(family: Path) -> None:
    found = analysis_of(*(family / name for name in ("base", "a", "b", "c")), matrices=0)
    points = np.array(positions(found))
    whole = found.group()
    assert whole is not None
    for (i, j), pair in zip(found.pairs, whole.measures.pairs, strict=True):
        assert pair.cosine is not None
        assert np.linalg.norm(points[i] - points[j]) == pytest.approx(np.sqrt(2 - 2 * pair.cosine), rel=1e-9)


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["base"], 2, "Missing argument 'MODELS...'"),
        (["base", "missing"], 1, "missing: no such directory"),
        (["base", "a", "a"], 2, "a is named 2 times"),
        (["base", "a", "base"], 2, "base is the base, and cannot be one of its fine-tunes"),
        (["base", "a", "--csv", "a"], 2, "--csv a: is a directory"),
        (
            ["base", "a", "--recipe", "r.yaml"],
            1,
            "--recipe r.yaml: not written, as no merge of these models is suggested",
        ),
        (["base", "wide"], 2, "differ in size: hidden_size 24 and 16"),
        (["base", "a", "nothing"], 1, "nothing"),
    ],
)
def test_what_is_refused(family: Path, call_cli: Call, arguments: list[str], code: int, words: str) -> None:
    write_model(family / "wide", base_tensors(hidden=24))
    (family / "nothing").mkdir()
    done = call_cli(["analyse", *arguments])
    assert done.code == code
    assert words in done.stderr
    assert "Traceback" not in done.stderr
    assert not (family / "r.yaml").exists()
