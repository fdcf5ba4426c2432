"""The table of architectures against transformers, and what stands in where the table has nothing."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest
from architectures import names, tiny

from merge.architecture import architecture_of, is_embedding, is_head, table
from merge.architecture.ask import ask

SOME = ("llama-tied", "gemma3n_text", "glm4_moe", "xlnet", "bert-masked", "modernbert", "t5", "bart", "llava", "llama4")


@pytest.fixture
def empty_table(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    nothing: dict[str, Any] = {"classes": {}, "model_types": {}, "kinds": [], "renames": [], "legacy": []}
    monkeypatch.setattr(table, "_table", lambda: nothing)
    table._asked.cache_clear()
    yield
    table._asked.cache_clear()


@pytest.mark.parametrize("name", [pytest.param(n, marks=[] if n in SOME else pytest.mark.full) for n in names()])
def test_the_table_says_what_transformers_says(name: str) -> None:
    cls = tiny(name)[0].__name__
    assert table.from_table(cls) == ask(cls), "run benchmarks/architecture_table.py"


@pytest.mark.parametrize("name", ["qwen3", "paligemma"])
def test_a_class_that_the_table_lacks_is_asked_of_transformers(name: str, empty_table: None) -> None:
    cls, config = tiny(name)
    found = architecture_of({**config.to_dict(), "architectures": [cls.__name__]})
    model = cls(config)
    assert {tie.target: tie.source for tie in found.ties if tie.holds(config.to_dict())} == model.all_tied_weights_keys
    assert found.embedding in model.state_dict()


def test_a_class_that_transformers_lacks_is_judged_by_its_names() -> None:
    own = {"architectures": ["HouseLM"], "model_type": "house", "tie_word_embeddings": True}
    found = architecture_of(own, ["trunk.wte.weight", "trunk.h.0.fc.weight"])
    (tie,) = found.ties
    assert (tie.target, tie.source, tie.holds(own)) == ("lm_head.weight", "trunk.wte.weight", True)
    assert not tie.holds(own | {"tie_word_embeddings": False})
    assert architecture_of(own, ["trunk.h.0.fc.weight"]).ties == ()


def test_a_config_without_a_class_is_loaded_as_a_language_model() -> None:
    assert architecture_of({"model_type": "mamba"}).name == "MambaForCausalLM"


@pytest.mark.parametrize("name", names())
def test_embeddings_and_heads_are_known_by_their_names_alone(name: str) -> None:
    found = table.from_table(tiny(name)[0].__name__)
    assert found.embedding is None or is_embedding(found.embedding)
    assert found.head is None or is_head(found.head)


def test_planning_does_not_import_transformers() -> None:
    code = (
        "import sys; from merge.architecture import architecture_of;"
        f"architecture_of({json.dumps({'architectures': ['LlamaForCausalLM']})});"
        "assert not {'torch', 'transformers'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_names_that_differ_in_numbers_are_asked_about_once_unless_a_pattern_tells_them_apart() -> None:
    asked = 0
    for cls in table._table()["classes"]:
        facts = table.from_table(cls)
        middles = [pattern.replace("\\", "").removeprefix("(^|.)").removesuffix("$") for pattern in facts.float32]
        keeps = facts.keeps_float32("BF16")
        for middle in middles:
            names = [f"model.layers.{n}.{middle}{end}" for n in (0, 1, 7, 12) for end in ("", ".0", ".1", ".12")]
            names += [middle.replace("0", "2").replace("1", "3"), middle]  # conv1d is not conv3d
            asked += len(names)
            assert [keeps(name) for name in names] == [facts.stays_float32(name, "BF16") for name in names], cls
    assert asked > 1000
