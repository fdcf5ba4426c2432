"""Adapters that cannot be folded, of another base, on the hub: what is read, noted and refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from adapter_files import make_adapter, make_base, plan_of
from safetensors.numpy import load_file, save_file

from merge import run_plan
from merge.adapters.files import open_adapter
from merge.checkpoint.hub import wanted
from merge.errors import CheckpointError, UsageError
from merge.recipe.model import ModelRef

pytestmark = pytest.mark.filterwarnings("ignore")  # what transformers and peft warn of is not ours


Change = Callable[[dict[str, Any], dict[str, np.ndarray]], None]
Q = "base_model.model.model.layers.0.self_attn.q_proj"


def _set(**settings: Any) -> Change:
    return lambda config, weights: config.update(settings)


def _add(**tensors: np.ndarray) -> Change:
    return lambda config, weights: weights.update({name.replace("__", "."): each for name, each in tensors.items()})


def _drop(name: str) -> Change:
    return lambda config, weights: weights.__delitem__(name)


def _put(name: str, shape: tuple[int, ...], dtype: str = "float32") -> Change:
    return lambda config, weights: weights.update({name: np.ones(shape, dtype)})


REFUSED: list[tuple[str, Change, str]] = [
    ("another kind", _set(peft_type="RANDLORA"), "peft_type: expected one of LORA, ADALORA, BOFT,"),
    ("another kind's tensors", _set(peft_type="LOHA"), "lora_A.weight: a part of an adapter that is not known here"),
    ("prompts", _set(peft_type="PROMPT_TUNING"), "PROMPT_TUNING changes what the model reads, not its weights"),
    ("a router", _set(peft_type="XLORA"), "XLORA chooses among adapters by the input"),
    ("no kind", lambda config, weights: config.pop("peft_type"), "found None"),
    ("no bias in B", _set(lora_bias=True), "q_proj: has no lora_B.bias, but lora_bias is True"),
    ("activated", _set(alora_invocation_tokens=[1]), "alora_invocation_tokens: activated LoRA"),
    ("replicated", _set(layer_replication=[[0, 2], [1, 2]]), "layer_replication: replicated layers"),
    ("a moved base", _set(init_lora_weights="pissa_niter_4"), "also changed the base model's weights"),
    ("no rank", _set(r=0), "r: expected a whole number above 0, found 0"),
    ("alpha", _set(lora_alpha="x"), "lora_alpha: expected a number, found 'x'"),
    ("an alpha beyond reason", _set(lora_alpha=10**299), "lora_alpha: expected a number"),
    ("patterns", _set(rank_pattern={"q_proj": "2"}), "rank_pattern: expected module names with a number each"),
    ("a bad pattern", _set(alpha_pattern={"q_(": 2}), '"q_(" is not a regular expression'),
    (
        "another rank",
        _set(r=5),
        "expected rank 5 as adapter_config.json says (r and rank_pattern), found lora_A [4, 32]",
    ),
    ("dora without lengths", _set(use_dora=True), "has no lora_magnitude_vector, but use_dora is True"),
    ("lengths without dora", _put(f"{Q}.lora_magnitude_vector", (32,)), "has a lora_magnitude_vector, but use_dora is"),
    ("an orphan", _put("base_model.model.x.lora_magnitude_vector", (3,)), "has no lora_A and lora_B beside it"),
    ("half a pair", _drop(f"{Q}.lora_B.weight"), f"{Q}.lora_A.weight: has no lora_B beside it"),
    ("a part that is not known", _put(f"{Q}.lora_C.weight", (3, 3)), "lora_C.weight: a part of an adapter that is not"),
    ("a bias of B", _put(f"{Q}.lora_B.bias", (32,)), "lora_B.bias: a bias inside a factor, but lora_bias is not set"),
    ("a convolution", _put(f"{Q}.lora_A.weight", (4, 32, 3, 3)), "change a matrix of 32 outputs and 288 inputs; model"),
    ("nothing gathered", _put(f"{Q}.lora_A.weight", (0,)), "shape [0] is not a matrix"),
    (
        "a nested parameter",
        _add(**{f"{Q}.base_layer.lora_{part}.weight": np.ones((4, 4), "float32") for part in "AB"}),
        "q_proj: target_parameters name 0 of its parameters",
    ),
    ("two adapters", _put(f"{Q}.lora_A.other.weight", (4, 32)), "q_proj.lora_A.other.weight are the same factor"),
    ("another width", _put(f"{Q}.lora_A.weight", (4, 30)), "of 32 outputs and 30 inputs; model.layers.0.self_attn"),
    ("whole numbers", _put(f"{Q}.lora_A.weight", (4, 32), "int32"), "is I32; expected F32, BF16 or F16"),
    (
        "another model",
        _put("base_model.model.model.layers.9.mlp.up_proj.bias", (3,)),
        "layers.9.mlp.up_proj.bias: not in",
    ),
    ("a larger vocabulary", _put("base_model.model.lm_head.weight", (44, 32)), "resizes the vocabulary, but not all"),
    ("saved modules", lambda config, _: config.update(modules_to_save=1.5), "modules_to_save: expected names of mod"),
    ("another shape", _put("base_model.model.model.norm.weight", (31,)), "expected shape [32], found [31]"),
    (
        "tokens unsaid",
        _put("base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta", (1, 32)),
        "has no trainable_token_indices",
    ),
]


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("sound")
    make_adapter(root / "adapter", make_base(root / "base"), target_modules=["q_proj", "v_proj"])
    return root


@pytest.mark.parametrize(("name", "change", "message"), REFUSED, ids=[name for name, _, _ in REFUSED])
def test_what_cannot_be_folded_is_refused(sound: Path, tmp_path: Path, name: str, change: Change, message: str) -> None:
    config = json.loads((sound / "adapter" / "adapter_config.json").read_text())
    weights = load_file(sound / "adapter" / "adapter_model.safetensors")
    change(config, weights)
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    save_file(weights, tmp_path / "adapter_model.safetensors")
    with pytest.raises(CheckpointError) as caught:
        plan_of(f"{sound}/base+{tmp_path}")
    assert message in str(caught.value)
    assert str(tmp_path) in str(caught.value)  # which adapter


def test_a_directory_without_an_adapter_is_told(sound: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="is not an adapter: it has no adapter_config"):
        plan_of(f"{sound}/base+{sound}/base")
    (tmp_path / "adapter_config.json").write_bytes((sound / "adapter" / "adapter_config.json").read_bytes())
    with pytest.raises(CheckpointError, match="but none of adapter_model"):
        plan_of(f"{sound}/base+{tmp_path}")


def test_another_base_is_a_note(sound: Path, tmp_path: Path) -> None:
    other = make_base(tmp_path / "other")
    notes = plan_of(f"{other}+{sound}/adapter").notes
    assert any(f"was trained on {sound}/base, and is folded into {other}" in note for note in notes)
    assert not any("was trained on" in note for note in plan_of(f"{sound}/base+{sound}/adapter").notes)


@pytest.mark.parametrize(
    ("train", "nested", "how"), [("qlora", True, "nf4 --nested"), ("qlora", False, "nf4"), ("lora", True, None)]
)
def test_an_adapter_trained_on_four_bits_says_which_base_it_saw(
    sound: Path, tmp_path: Path, train: str, nested: bool, how: str | None
) -> None:
    from merge.recipe.references import parse_reference
    from merge.tools.quantize import quantize

    record = {"config": {"train": train, "double_quantization": nested}}
    (sound / "adapter/finetune_manifest.json").write_text(json.dumps(record), encoding="utf-8")
    notes = [note for note in plan_of(f"{sound}/base+{sound}/adapter").notes if "4 bits" in note]
    assert len(notes) == (how is not None)
    assert how is None or notes[0].endswith(f"merge quantize {sound}/base -o BASE --to {how} --dequantize")
    quantize(parse_reference(f"{sound}/base"), tmp_path / "seen", "nf4", dequantize=True)
    assert not any("4 bits" in note for note in plan_of(f"{tmp_path}/seen+{sound}/adapter").notes)


def test_patterns_and_alphas_set_each_modules_scaling(sound: Path, tmp_path: Path) -> None:
    make_adapter(tmp_path, sound / "base", use_rslora=True, alpha_pattern={"v_proj": 8}, rank_pattern={"1.*q_proj": 9})
    modules = open_adapter(ModelRef("a", str(tmp_path))).modules
    found = {name: (module.rank, module.scaling) for name, module in modules.items()}
    assert found["model.layers.0.self_attn.v_proj"] == (4, 8 / 2)
    assert found["model.layers.1.self_attn.q_proj"] == (9, 6 / 3)
    assert found["model.layers.0.self_attn.q_proj"] == (4, 6 / 2)


COMMIT = "0123456789" * 4


@pytest.mark.parametrize("weights", ["adapter_model.safetensors", "adapter_model.bin"])
def test_an_adapter_of_the_hub_is_found_in_the_cache(
    sound: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, weights: str
) -> None:
    import torch
    from huggingface_hub import constants
    from safetensors.torch import load_file as load_torch

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    repository = tmp_path / "models--org--lora"
    snapshot = repository / "snapshots" / COMMIT
    snapshot.mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(COMMIT)
    source = sound / "adapter"
    (snapshot / "adapter_config.json").write_bytes((source / "adapter_config.json").read_bytes())
    with pytest.raises(CheckpointError, match="org/lora: not a local directory, and not complete"):
        plan_of(f"{sound}/base+org/lora")
    if weights.endswith(".bin"):
        torch.save(load_torch(source / "adapter_model.safetensors"), snapshot / weights)
    else:
        (snapshot / weights).write_bytes((source / weights).read_bytes())
    notes = plan_of(f"{sound}/base+org/lora").notes
    assert any(f"org/lora: adapter of commit {COMMIT}" in note for note in notes)


def test_of_an_adapter_on_the_hub_config_and_weights_are_downloaded() -> None:
    there = ["README.md", "adapter_config.json", "adapter_model.bin", "adapter_model.safetensors", "optimizer.pt"]
    assert wanted(there, adapter=True) == ["adapter_config.json", "adapter_model.safetensors"]
    there.remove("adapter_model.safetensors")
    assert wanted(there, adapter=True) == ["adapter_config.json", "adapter_model.bin"]


def test_an_output_does_not_replace_its_own_adapter(sound: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    for file in (sound / "adapter").iterdir():
        (tmp_path / "out" / file.name).write_bytes(file.read_bytes())
    with pytest.raises(UsageError, match="which this run reads; nothing was changed"):
        run_plan(plan_of(f"{sound}/base+{tmp_path}/out"), tmp_path / "out", force=True)


def test_a_float64_model_is_refused(sound: Path, tmp_path: Path) -> None:
    base = tmp_path / "base"
    base.mkdir()
    (base / "config.json").write_bytes((sound / "base" / "config.json").read_bytes())
    weights = load_file(sound / "base" / "model.safetensors")
    save_file({name: values.astype(np.float64) for name, values in weights.items()}, base / "model.safetensors")
    with pytest.raises(CheckpointError, match="is F64, and"):
        plan_of(f"{base}+{sound}/adapter")
