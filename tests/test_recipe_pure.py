"""A recipe's text is read by itself; what is on the disk or the hub is asked once it is resolved."""

from __future__ import annotations

import builtins
import io
import os
import runpy
import socket
from pathlib import Path

import pytest

from merge.methods.registry import all_methods
from merge.moe_layouts import all_layouts
from merge.planning.load import parse_recipe
from merge.planning.resolve import made_recipe, reference
from merge.recipe import draft_of
from merge.recipe.model import ModelRef, Recipe, Source
from merge.recipe.names import RECIPE
from merge.recipe.pipeline import stage_names
from merge.schema.document import read_document, read_documents

ROOT = Path(__file__).parents[1]
ASKING = [
    *((os, name) for name in ("open", "stat", "lstat", "listdir", "scandir", "getcwd")),
    *((io, "open"), (builtins, "open"), (socket, "socket")),
]


def test_parsing_asks_neither_the_disk_nor_the_network(monkeypatch: pytest.MonkeyPatch) -> None:
    parity = runpy.run_path(str(ROOT / "benchmarks" / "parity_recipes.py"))
    # search.yaml has open places: `merge search` makes recipes of it.
    texts = [file.read_text() for file in (ROOT / "recipes").glob("*.yaml") if file.stem != "search"]
    texts += [*(text for _, _, text in parity["RECIPES"]), *parity["EXAMPLES"].values()]
    all_methods(), all_layouts()

    def refuse(*args: object, **kwargs: object) -> None:
        raise AssertionError(f"asked for {args}")

    with monkeypatch.context() as patched:
        for module, name in ASKING:
            patched.setattr(module, name, refuse)
        documents = [read_documents(text, None, RECIPE) for text in texts]
        drafts = [
            draft_of(document.root, document.text, None, seen)
            for several in documents
            for document, seen in zip(several, stage_names(several), strict=True)
        ]
        with pytest.raises(AssertionError, match="asked for"):
            parse_recipe("merge_method: passthrough\nmodels: [{model: somewhere}]\n")
    assert len(drafts) > len(texts) > 60
    assert not any(draft.reader.n_problems for draft in drafts)


def test_references_are_kept_as_they_are_written() -> None:
    text = "merge_method: linear\nmodels: [{model: ./here+org/lora@v1}, {model: {model: {path: a, revision: b}}}]\n"
    first, second = draft_of(read_document(text, None, RECIPE), text, None).recipe.models
    assert (first.model.path, first.model.adapter, first.model.line) == ("./here+org/lora@v1", None, 2)
    assert (second.model.text, second.model.path, second.model.revision) == ("a@b", "a", "b")


def test_a_recipe_made_of_values_has_the_text_that_says_the_same(tmp_path: Path) -> None:
    for name in ("a+b", 'c"d'):
        (tmp_path / name).mkdir()
    base = ModelRef("base", str(tmp_path / "a+b"), adapter=ModelRef("lora", "org/lora", "v1"))
    sources = (
        Source(base, parameters={"weight": 0.25}),
        Source(reference(str(tmp_path / 'c"d')), parameters={"weight": 1}),
    )
    made = made_recipe(Recipe("linear", sources, name="both", dtype="BF16", allow=("nonfinite",)))
    again = parse_recipe(made.text)
    assert (again.merge_method, again.name, again.dtype, again.allow) == ("linear", "both", "BF16", ("nonfinite",))
    assert [(each.model, each.parameters) for each in again.models] == [
        (each.model, each.parameters) for each in made.models
    ]
