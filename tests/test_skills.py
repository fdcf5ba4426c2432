"""The skills family's data: answers are right, no item is in two files, seeds repeat; and its configs are read."""

from __future__ import annotations

import hashlib
import json
import re
import runpy
from pathlib import Path
from typing import Any

import pytest

from eval.tasks.jsonl import read_rows
from finetune.config import load_config
from merge.methods import all_methods
from merge.recipe.build import draft_of
from merge.recipe.names import RECIPE
from merge.schema.document import read_document

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "recipes" / "skills"
DATA: dict[str, Any] = runpy.run_path(str(FOLDER / "data.py"))
NAMES = tuple(DATA["SKILLS"])
SIDES = ("train", "held-out", "search", "report")


def solved(prompt: str) -> str:
    """The answer by other means than the generators have."""
    text = prompt.removesuffix(":")
    match text.split(" "):
        case ["Flip", digits]:
            number, flipped = int(f"1{digits}"), ""
            while number > 1:
                number, last = divmod(number, 10)
                flipped += str(last)
            return flipped
        case ["Next", *letters]:
            return " ".join("a" if letter == "z" else chr(ord(letter) + 1) for letter in letters)
        case ["Kind", word]:
            return str(DATA["KINDS"][re.sub(r".*-", "", word)])
        case ["Bora", article, adjective, noun]:
            spoken = {"the": "ta", "a": "mo", "my": "si", "this": "ke"}
            return f"{noun} {adjective} {spoken[article]}"
        case ["Back", first, second, third]:
            return f"{third} {second} {first}"
        case ["Initials", *words]:
            return " ".join(re.findall(r"\b\w", " ".join(words)))
        case ["Convert", number, unit]:
            zeros, into = DATA["UNITS"][unit]
            return f"{int(number) * 10**zeros} {into}"
        case ["Date", date]:
            month, day, _ = date.split("/")
            return f"{'JanFebMarAprMayJunJulAugSepOctNovDec'[3 * int(month) - 3 : 3 * int(month)]} {int(day)}"
    raise AssertionError(prompt)


@pytest.mark.parametrize("name", NAMES)
def test_every_answer_is_right_and_short(name: str) -> None:
    for side in SIDES:
        for prompt, answer in DATA["items"](name, side, 40):
            assert solved(prompt) == answer
            assert "\n" not in prompt + answer
            assert answer == answer.strip()


@pytest.mark.parametrize("name", NAMES)
def test_no_item_is_on_two_sides_and_seeds_repeat(name: str) -> None:
    drawn = {side: DATA["items"](name, side, count) for side, count in DATA["ROWS"].items()}
    prompts = [prompt for rows in drawn.values() for prompt, _ in rows]
    assert len(prompts) == len(set(prompts)) == sum(DATA["ROWS"].values())
    assert drawn["report"] == DATA["items"](name, "report", DATA["ROWS"]["report"])
    assert drawn["report"] != DATA["items"](name, "report", DATA["ROWS"]["report"], seed=1)


def test_every_machine_makes_the_same_items() -> None:
    drawn = [DATA["items"](name, side, count) for name in NAMES for side, count in DATA["ROWS"].items()]
    digest = hashlib.sha256(b"".join(json.dumps(rows).encode() for rows in drawn)).hexdigest()
    assert digest == "dd8199bc92b4a2017a5ba29687fe46baa49f2a92d9be726794aad06bf60925c9"


def test_the_files_are_read_by_training_and_evaluation(tmp_path: Path) -> None:
    DATA["write_data"](tmp_path)
    for name in NAMES:
        for side in ("search", "report"):
            assert len(read_rows(tmp_path / side / f"{name}.jsonl")) == DATA["ROWS"][side]
        for ending in ("", "-held-out"):
            first = json.loads((tmp_path / f"{name}{ending}.jsonl").read_text(encoding="utf-8").splitlines()[0])
            assert first.keys() == {"prompt", "completion"}


@pytest.mark.parametrize("name", ["expert", "simultaneous"])
def test_the_configs_are_read(name: str) -> None:
    config = load_config(str(FOLDER / f"{name}.yaml"), {"data": ["x.jsonl"], "out": ["out"]})
    assert config.train == "lora"
    assert [source.path for source in config.data] == ["x.jsonl"]


def test_the_simultaneous_training_sees_all_skills() -> None:
    config = load_config(str(FOLDER / "simultaneous.yaml"))
    assert sorted(Path(source.path).stem for source in config.data) == sorted(NAMES)


def test_the_best_recipe_merges_every_expert() -> None:
    text = (FOLDER / "iso.yaml").read_text(encoding="utf-8")
    read = draft_of(read_document(text, None, RECIPE), text, None)
    read.reader.raise_if_any()
    assert re.findall(r"\+\S*/(\w+)$", text, re.MULTILINE) == list(NAMES)


def test_every_method_that_merges_the_experts_is_measured_with_a_recipe_that_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    evidence = runpy.run_path(str(ROOT / "benchmarks" / "evidence.py"))
    family = evidence["Family"](tmp_path, tmp_path)
    measured = [method for method in all_methods().values() if evidence["mergeable"](method)]
    assert {"linear", "ties", "tsv"} <= {method.name for method in measured}
    assert not {"slerp", "passthrough", "fisher", "svd"} & {method.name for method in measured}
    for method in measured:
        for _, parameters in evidence["settings"](method, len(NAMES)):
            text = Path(family.recipe("merged", method, NAMES, parameters)).read_text(encoding="utf-8")
            read = draft_of(read_document(text, None, RECIPE), text, None)
            read.reader.raise_if_any()
            assert read.recipe.merge_method == method.name
