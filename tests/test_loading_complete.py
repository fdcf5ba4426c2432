"""A checkpoint is loaded whole or not at all: nothing starts at random that should not, and nothing is left out."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import architectures
import pytest
from tiny_bert import make_tiny_bert
from tiny_llama import make_tiny_llama, write_lines

from merge.errors import CheckpointError, MergeError
from merge.loading import CAUSAL, check_stored, load_model
from merge.loading.complete import check_complete

Change = Callable[[dict[str, Any]], None]
DOWN = "model.layers.1.mlp.down_proj.weight"


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    return {
        "llama": make_tiny_llama(root / "llama"),
        "tied": make_tiny_llama(root / "tied", tied=True),
        "bert": make_tiny_bert(root / "bert"),
    }


@pytest.fixture
def changed(models: dict[str, Path], tmp_path: Path) -> Callable[..., Path]:
    """changed("llama", change): a copy whose tensors went through `change`."""
    from safetensors.torch import load_file, save_file

    def make(name: str, change: Change) -> Path:
        path = shutil.copytree(models[name], tmp_path / "changed")
        tensors = load_file(path / "model.safetensors")
        change(tensors)
        save_file(tensors, path / "model.safetensors", {"format": "pt"})
        return Path(path)

    return make


def without(*names: str) -> Change:
    def change(tensors: dict[str, Any]) -> None:
        for name in names:
            del tensors[name]

    return change


def renamed(old: str, new: str) -> Change:
    return lambda tensors: tensors.update({new: tensors.pop(old)})


def added(name: str, *shape: int) -> Change:
    import torch

    return lambda tensors: tensors.update({name: torch.zeros(shape)})


@pytest.mark.parametrize("kind", [CAUSAL, "AutoModelForSequenceClassification", "AutoModel"])
@pytest.mark.parametrize("name", [DOWN, "model.norm.weight", "model.embed_tokens.weight"])
def test_a_tensor_that_is_missing_is_named_also_where_a_new_head_is_welcome(
    changed: Callable[..., Path], kind: str, name: str
) -> None:
    path = changed("llama", without(name))
    with pytest.raises(
        CheckpointError, match=rf"changed: lacks .*{name.removeprefix('model.')} for .* start at random"
    ):
        load_model(kind, str(path), new_heads=kind != CAUSAL)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (without(DOWN, "lm_head.weight"), r"lacks lm_head.weight for LlamaForCausalLM \(2 such tensors\)"),
        (added("model.layers.0.self_attn.q_proj.bias", 64), r"has .*q_proj.bias, for which LlamaForCausalLM has no"),
        (added("model.layers.2.input_layernorm.weight", 64), r"has model.layers.2.input_layernorm.weight, for which"),
        (added("v_head.weight", 1, 64), r"has v_head.weight, for which LlamaForCausalLM has no place"),
        (added("model.norm.weight", 32), r"model.norm.weight is \(32,\), and LlamaForCausalLM has \(64,\)"),
        (renamed(DOWN, f"{DOWN}s"), rf"lacks {DOWN} for"),
    ],
)
def test_what_a_causal_model_lacks_or_has_no_place_for_is_named(
    changed: Callable[..., Path], change: Change, said: str
) -> None:
    with pytest.raises(CheckpointError, match=said):
        load_model(CAUSAL, str(changed("llama", change)))


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("tied", without()),  # no head of its own
        ("llama", added("score.weight", 2, 64)),  # a classifier's
        ("llama", added("model.layers.0.self_attn.rotary_emb.inv_freq", 8)),  # as Llama was once saved
    ],
)
def test_what_transformers_knows_to_be_harmless_is(changed: Callable[..., Path], name: str, change: Change) -> None:
    assert load_model(CAUSAL, str(changed(name, change))).new == ()


@pytest.mark.parametrize(
    ("name", "kind", "new"),
    [
        ("llama", "AutoModelForSequenceClassification", ["score.weight"]),
        ("llama", "AutoModel", []),
        ("bert", "AutoModelForMaskedLM", []),
        ("bert", "AutoModel", ["pooler.dense.bias", "pooler.dense.weight"]),
        (
            "bert",
            "AutoModelForSequenceClassification",
            ["bert.pooler.dense.bias", "bert.pooler.dense.weight", "classifier.bias", "classifier.weight"],
        ),
    ],
)
def test_a_head_that_the_base_lacks_is_new_where_that_is_welcome_and_nowhere_else(
    models: dict[str, Path], name: str, kind: str, new: list[str]
) -> None:
    path = str(models[name])
    assert list(load_model(kind, path, new_heads=True).new) == new
    if new:
        with pytest.raises(CheckpointError, match=rf"lacks {new[0]}"):
            load_model(kind, path)
        assert load_model(kind, path, brought=new).new == ()


VERBS = {
    "generate": ["generate", "changed", "--prompt", "ab"],
    "perplexity": ["perplexity", "changed", "--data", "text.jsonl"],
    "gram": ["statistics", "changed", "--data", "text.jsonl", "-o", "out"],
    "fisher": ["statistics", "changed", "--data", "text.jsonl", "-o", "out", "--kind", "fisher"],
    "finetune": ["finetune", "--model", "changed", "--data", "text.jsonl", "-o", "out"],
    "eval": ["eval", "changed", "--data", "text.jsonl", "--cache", "answers"],
    "quantize": ["quantize", "changed", "-o", "out", "--to", "fp8"],
}


@pytest.mark.parametrize("change", [without(DOWN), added("model.layers.0.self_attn.q_proj.bias", 64)])
@pytest.mark.parametrize("verb", VERBS)
def test_no_verb_goes_on_with_random_or_left_out_weights(
    changed: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, verb: str, change: Change
) -> None:
    from merge.cli import cli

    changed("llama", change)
    monkeypatch.chdir(tmp_path)
    write_lines(Path("text.jsonl"), [{"text": "abc def"}] * 4)
    with pytest.raises(MergeError, match=r"changed: (lacks|has) model.layers"):
        cli(VERBS[verb], standalone_mode=False)
    assert not Path("out").exists()


@pytest.mark.full
@pytest.mark.parametrize("name", architectures.names())
def test_a_model_of_every_architecture_is_found_whole(tmp_path: Path, name: str) -> None:
    import transformers

    from merge.checkpoint import open_checkpoint
    from merge.recipe.references import parse_reference

    model = architectures.build(name)
    model.save_pretrained(tmp_path)
    kind = getattr(transformers, type(model).__name__)
    loaded, found = kind.from_pretrained(tmp_path, output_loading_info=True)
    assert check_complete(loaded, found, "") == ()
    stored = {key: ref.shape for key, ref in open_checkpoint(parse_reference(str(tmp_path))).tensors.items()}
    check_stored(loaded, stored, "")
    first = next(iter(stored))
    with pytest.raises(CheckpointError, match=f"lacks {first}"):
        check_complete(loaded, {**found, "missing_keys": {first}}, "")
