"""Adapters on many architectures: folded as PEFT merges the loaded model, and extracted so that PEFT applies them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from adapter_files import plan_of
from architectures import build, names

from merge import run_plan
from merge.recipe.model import ModelRef
from merge.tools.extract import extract_adapter
from merge.tools.extract.select import Choice

pytestmark = pytest.mark.filterwarnings("ignore")  # what transformers and peft warn of is not ours
FEW = ("gpt2", "llava", "gemma3", "qwen2_5_vl", "qwen3_moe", "gpt_oss", "glm4_moe", "whisper")
REST = [pytest.param(name, marks=pytest.mark.full) for name in names() if name not in FEW]
EXPERTS = ("qwen3_moe", "gpt_oss", "mixtral", "llama4", "granitemoe")
# Layers that PEFT does not wrap, since those models' own kernels use their weights.
NOT_WRAPPED = {"mamba": ["out_proj"], "mamba2": ["out_proj"], "falcon_h1": ["out_proj"]}


@pytest.fixture(autouse=True)
def _quiet() -> None:
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()


def check_fold(name: str, folder: Path, **settings: Any) -> None:
    """Folds an adapter of random numbers; the loaded result is what merge_and_unload makes of the model."""
    import peft
    import torch

    model = build(name)
    model.save_pretrained(folder / "base")
    before = {key: each.clone() for key, each in model.state_dict().items()}
    made = peft.get_peft_model(
        model, peft.LoraConfig(**{"r": 3, "lora_alpha": 5, "target_modules": "all-linear"} | settings)
    )
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in made.parameters():
            if parameter.requires_grad:
                parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    made.save_pretrained(folder / "adapter")
    expected = made.merge_and_unload().state_dict()
    run_plan(plan_of(f"{folder}/base+{folder}/adapter"), folder / "out", threads=1)
    found, report = type(model).from_pretrained(folder / "out", output_loading_info=True)
    assert not any(report.values()), report
    loaded = found.state_dict()
    changed = [key for key in expected if not torch.equal(expected[key], before[key])]
    assert changed
    for key, values in expected.items():
        if key in changed:
            torch.testing.assert_close(loaded[key], values, rtol=1e-5, atol=1e-5)
        else:
            assert torch.equal(loaded[key], values), key


@pytest.mark.parametrize("name", [*FEW, *REST])
def test_lora_on_all_linear_layers_is_folded_as_peft_folds_it(name: str, tmp_path: Path) -> None:
    check_fold(name, tmp_path, exclude_modules=NOT_WRAPPED.get(name))


@pytest.mark.parametrize("name", EXPERTS)
def test_lora_on_experts_is_folded_as_peft_folds_it(name: str, tmp_path: Path) -> None:
    parameters = ["experts.gate_up_proj", "experts.down_proj"]
    check_fold(name, tmp_path, target_modules=["q_proj"], target_parameters=parameters)


@pytest.mark.parametrize("name", [*FEW, *REST])
def test_peft_applies_what_is_extracted(name: str, tmp_path: Path) -> None:
    import peft
    import torch

    base, tuned = build(name), build(name, seed=1, step=0.05)
    for model, folder in ((base, "base"), (tuned, "tuned")):
        model.save_pretrained(tmp_path / folder)
    refs = [ModelRef(str(tmp_path / folder), str(tmp_path / folder)) for folder in ("tuned", "base")]
    summary = extract_adapter(*refs, tmp_path / "adapter", choice=Choice(rank=64), threads=1)
    assert summary.error < 1e-5
    loaded = type(base).from_pretrained(tmp_path / "base")
    merged = peft.PeftModel.from_pretrained(loaded, tmp_path / "adapter").merge_and_unload().state_dict()
    assert summary.modules
    for row in summary.modules:
        key = row["module"] if row["parameter"] else f"{row['module']}.weight"
        torch.testing.assert_close(merged[key], tuned.state_dict()[key], rtol=1e-5, atol=1e-5)
