"""The tokenizer that came with an adapter: named where it differs, taken where it is asked for or needed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from adapter_files import plan_of, read
from click.testing import CliRunner
from tiny_llama import make_tiny_llama

from merge import run_plan
from merge.cli import cli
from merge.errors import CheckpointError

pytestmark = pytest.mark.filterwarnings("ignore")  # what transformers and peft warn of is not ours
TEMPLATE = "{% for m in messages %}{{ '[' + m['content'] + ']' }}{% endfor %}"


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_llama(tmp_path_factory.mktemp("base") / "base")


def make(
    path: Path, base: Path, new: list[str], template: str | None = None, resize: bool = False, **settings: Any
) -> dict[str, np.ndarray]:
    """An adapter with its tokenizer, as a trainer saves both; returns what PEFT makes of the model."""
    import torch
    from peft import LoraConfig, PeftModel, get_peft_model
    from transformers import AutoModelForCausalLM, AutoTokenizer

    def fresh() -> Any:
        model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
        if resize:
            torch.manual_seed(0)
            model.resize_token_embeddings(len(tokenizer))
        return model

    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.add_tokens(new)
    tokenizer.chat_template = template or tokenizer.chat_template
    made = get_peft_model(fresh(), LoraConfig(**{"r": 2, "target_modules": ["q_proj"]} | settings))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in made.parameters():
            if parameter.requires_grad:
                parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    made.save_pretrained(path)
    tokenizer.save_pretrained(path)
    merged = PeftModel.from_pretrained(fresh(), path).merge_and_unload()
    return {name: each.detach().float().numpy().copy() for name, each in merged.state_dict().items()}


def files(out: Path) -> dict[str, Any]:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(out)
    return {"size": len(tokenizer), "template": tokenizer.chat_template}


def test_a_tokenizer_of_its_own_is_a_note_and_not_taken(base: Path, tmp_path: Path) -> None:
    make(tmp_path / "a", base, ["<new>"], TEMPLATE)
    plan = plan_of(f"{base}+{tmp_path}/a")
    (note,) = [note for note in plan.notes if "tokenizer of its own" in note]
    assert "1 are new, and another chat template" in note
    assert f"tokenizer_source: {tmp_path}/a" in note
    run_plan(plan, tmp_path / "out", threads=1)
    assert files(tmp_path / "out") == files(base)


def test_the_same_tokenizer_is_no_note(base: Path, tmp_path: Path) -> None:
    make(tmp_path / "a", base, [])
    assert not any("tokenizer" in note for note in plan_of(f"{base}+{tmp_path}/a").notes)


def test_the_adapters_tokenizer_is_taken_where_a_recipe_names_it(base: Path, tmp_path: Path) -> None:
    make(tmp_path / "a", base, [], TEMPLATE)
    plain, asked = (plan_of(f"{base}+{tmp_path}/a", **keys) for keys in ({}, {"tokenizer_source": str(tmp_path / "a")}))
    assert asked.steps == plain.steps
    run_plan(asked, tmp_path / "out", threads=1)
    assert files(tmp_path / "out")["template"] == TEMPLATE
    assert not any("not taken" in note for note in asked.notes)


def test_merge_lora_fold_offers_it(base: Path, tmp_path: Path) -> None:
    make(tmp_path / "a", base, [], TEMPLATE)
    arguments = ["lora", "fold", str(base), str(tmp_path / "a"), "-o", str(tmp_path / "out"), "--adapter-tokenizer"]
    done = CliRunner().invoke(cli, [*arguments, "--quiet"], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    assert files(tmp_path / "out")["template"] == TEMPLATE


WAYS: dict[str, dict[str, Any]] = {
    "saved": {},
    "lora": {"target_modules": ["embed_tokens", "lm_head", "q_proj"]},
    "both in modules_to_save": {"modules_to_save": ["embed_tokens", "lm_head"]},
    "the head in modules_to_save": {"modules_to_save": ["lm_head"]},
    "the embedding in modules_to_save": {"modules_to_save": ["embed_tokens"]},
    "new tokens": {"trainable_token_indices": [79, 80, 3]},
}


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("way", WAYS)
def test_a_resized_vocabulary_is_folded_with_its_tokenizer(tmp_path: Path, way: str, tied: bool) -> None:
    base = make_tiny_llama(tmp_path / "base", tied=tied)
    expected = make(tmp_path / "a", base, ["<x>", "<y>", "<z>"], TEMPLATE, resize=True, **WAYS[way])
    plan = plan_of(f"{base}+{tmp_path}/a")
    assert any("the tokenizer is the adapter's" in note for note in plan.notes)
    run_plan(plan, tmp_path / "out", threads=1)
    found = read(tmp_path / "out")
    if json.loads((tmp_path / "out" / "config.json").read_text())["tie_word_embeddings"]:
        found["lm_head.weight"] = found["model.embed_tokens.weight"]
    assert found.keys() == expected.keys()
    for name in found:
        np.testing.assert_allclose(found[name], expected[name], rtol=2.0**-7, atol=2.0**-9, err_msg=name)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["vocab_size"] == len(expected["lm_head.weight"])
    assert files(tmp_path / "out") == files(tmp_path / "a")


def test_an_adapter_with_only_a_resized_embedding_is_refused_with_what_to_do(base: Path, tmp_path: Path) -> None:
    from safetensors.numpy import load_file, save_file

    make(tmp_path / "a", base, ["<x>"], resize=True)
    weights = load_file(tmp_path / "a" / "adapter_model.safetensors")
    save_file(
        {name: each for name, each in weights.items() if "lm_head" not in name},
        tmp_path / "a" / "adapter_model.safetensors",
    )
    with pytest.raises(CheckpointError, match=r"resizes the vocabulary, but not all .*modules_to_save"):
        plan_of(f"{base}+{tmp_path}/a")


def test_an_adapter_without_a_tokenizer_cannot_be_its_source(base: Path, tmp_path: Path) -> None:
    make(tmp_path / "a", base, [])
    for file in (tmp_path / "a").glob("*token*"):
        file.unlink()
    with pytest.raises(Exception, match="has no tokenizer files"):
        plan_of(f"{base}+{tmp_path}/a", tokenizer_source=str(tmp_path / "a"))
