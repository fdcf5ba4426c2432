"""Adapters: folded while they are read as PEFT folds them, extracted again, and refused where neither is exact."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from merge import build_plan, parse_recipe, run_plan
from merge.adapters.files import open_adapter
from merge.checkpoint.hub import wanted
from merge.checkpoint.reader import SourceReader
from merge.errors import CheckpointError, UsageError
from merge.plan import Derived, Plan
from merge.recipe.model import ModelRef

pytestmark = pytest.mark.filterwarnings("ignore")  # what transformers and peft warn of is not ours

LLAMA = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 40,
    "max_position_embeddings": 32,
}
GPT2 = {"n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": 40, "n_positions": 32}


def make_base(path: Path, kind: str = "llama", dtype: str = "float32", **changes: Any) -> Path:
    """A tiny transformers model of random numbers."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    sizes = (GPT2 if kind == "gpt2" else LLAMA) | changes
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **sizes)).to(getattr(torch, dtype))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    model.save_pretrained(path)
    return path


def make_adapter(
    path: Path, base: Path, dtype: str = "float32", seed: int = 1, noise: float = 0.1, **settings: Any
) -> dict[str, Any]:
    """An adapter of random numbers, as PEFT saves it; returns what merge_and_unload makes of the base."""
    import torch
    from peft import LoraConfig, PeftModel, get_peft_model
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(base, dtype=getattr(torch, dtype))
    settings = {"r": 4, "lora_alpha": 6, "target_modules": "all-linear"} | settings
    peft = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **settings))
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in peft.parameters():
            if parameter.requires_grad:
                parameter.add_(noise * torch.randn_like(parameter))
    peft.save_pretrained(path)
    # from the files, as anybody gets it
    model = AutoModelForCausalLM.from_pretrained(base, dtype=getattr(torch, dtype))
    merged = PeftModel.from_pretrained(model, path).merge_and_unload()
    tensors = {name: values.detach().float().numpy().copy() for name, values in merged.state_dict().items()}
    return tensors | {"tied": merged.config.tie_word_embeddings}


def plan_of(reference: str, **keys: Any) -> Plan:
    recipe = {"merge_method": "passthrough", "models": [{"model": reference}]} | keys
    return build_plan(parse_recipe(json.dumps(recipe)))


def fold(base: Path, adapter: Path, out: Path, **options: Any) -> dict[str, np.ndarray]:
    """`base+adapter` written to the disk."""
    run_plan(plan_of(f"{base}+{adapter}"), out, **options)
    return read(out)


def read(out: Path) -> dict[str, np.ndarray]:
    import torch
    from safetensors.torch import load_file as load_torch

    tensors: dict[str, torch.Tensor] = {}
    for file in sorted(out.glob("*.safetensors")):
        tensors |= load_torch(file)
    return {name: values.float().numpy() for name, values in tensors.items()}


def ulps(left: np.ndarray, right: np.ndarray) -> int:
    """The largest distance in steps of bfloat16 between numbers that are bfloat16."""
    steps = [np.asarray(each, np.float32).view(np.int32).astype(np.int64) >> 16 for each in (left, right)]
    ordered = [np.where(bits < 0, -(bits & 0x7FFF), bits) for bits in steps]
    return int(np.abs(ordered[0] - ordered[1]).max())


def steps_apart(found: np.ndarray, expected: np.ndarray, before: np.ndarray) -> float:
    """The largest distance of two folded tensors in steps of bfloat16.

    The step is that of the larger of the weight and its change. Where they cancel, or the terms of the change do, PEFT
    has lost digits by its sums in float32: a millionth of the largest change is not counted.
    """
    change = np.abs(found - before)
    larger = np.maximum(np.maximum(np.abs(before), change), np.abs(found))
    step = 2.0 ** (np.floor(np.log2(np.maximum(larger, 1e-30))) - 7)
    return float(((np.abs(found - expected) - 1e-6 * change.max()) / step).max())


def as_bfloat16(values: np.ndarray) -> np.ndarray:
    import torch

    return torch.from_numpy(values).to(torch.bfloat16).float().numpy()


SETTINGS: dict[str, dict[str, Any]] = {
    "lora": {},
    "rslora": {"use_rslora": True},
    "dora": {"use_dora": True},
    "embedding": {"target_modules": ["embed_tokens", "q_proj"]},
    "embedding and head": {"target_modules": ["embed_tokens", "lm_head", "v_proj"]},
    "dora of an embedding": {"target_modules": ["embed_tokens", "q_proj"], "use_dora": True},
    "patterns": {
        "rank_pattern": {"q_proj": 2, r"layers\.1\.mlp\..*": 7},
        "alpha_pattern": {"^model.layers.0.self_attn.v_proj": 16, "down_proj": 3},
    },
    "rslora with patterns": {"use_rslora": True, "rank_pattern": {"o_proj": 9}},
    "modules_to_save": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head", "input_layernorm"]},
    "saved embedding": {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]},
    "trained tokens": {"target_modules": ["q_proj"], "trainable_token_indices": [3, 0, 39]},
}


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("kind", SETTINGS)
def test_a_folded_adapter_is_what_peft_makes_of_it(tmp_path: Path, kind: str, tied: bool) -> None:
    base = make_base(tmp_path / "base", tie_word_embeddings=tied)
    expected = make_adapter(tmp_path / "adapter", base, **SETTINGS[kind])
    found = fold(base, tmp_path / "adapter", tmp_path / "out")
    is_tied = expected.pop("tied")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["tie_word_embeddings"] == is_tied
    if is_tied:
        assert np.array_equal(expected.pop("lm_head.weight"), expected["model.embed_tokens.weight"])
    assert found.keys() == expected.keys()
    before = read(base)
    assert any(not np.array_equal(found[name], before[name]) for name in before)
    for name in found:
        np.testing.assert_allclose(found[name], expected[name], rtol=1e-6, atol=1e-6, err_msg=name)


@pytest.mark.parametrize("kind", ["lora", "dora", "embedding", "modules_to_save"])
def test_in_bfloat16_it_is_within_one_step_of_pefts(tmp_path: Path, kind: str) -> None:
    base = make_base(tmp_path / "base", dtype="bfloat16", tie_word_embeddings=True)
    expected = make_adapter(tmp_path / "adapter", base, "bfloat16", **SETTINGS[kind])
    found = fold(base, tmp_path / "adapter", tmp_path / "out")
    before = read(base)
    for name in found:
        if kind == "embedding" and "embed" in name:  # PEFT rounds an embedding's change before it adds it
            step = 2.0**-7 * (np.abs(before[name]) + np.abs(found[name]))
            assert (np.abs(found[name] - expected[name]) <= step).all(), name
            weights = read(tmp_path / "adapter")
            a, b = (weights[f"base_model.model.model.embed_tokens.lora_embedding_{part}"] for part in "AB")
            exact = before[name] + 1.5 * (b.astype(np.float64) @ a).T
            assert ulps(found[name], as_bfloat16(exact)) <= 1
        else:
            old = before.get(name, before["model.embed_tokens.weight"])  # of a head that was tied
            assert steps_apart(found[name], expected[name], old) <= 1, name


@pytest.mark.parametrize("dora", [False, True])
def test_matrices_stored_by_input_are_folded_turned(tmp_path: Path, dora: bool) -> None:
    base = make_base(tmp_path / "base", "gpt2")
    expected = make_adapter(
        tmp_path / "adapter", base, target_modules=["c_attn", "c_proj", "c_fc", "wte"], use_dora=dora
    )
    found = fold(base, tmp_path / "adapter", tmp_path / "out")
    for name in found:
        np.testing.assert_allclose(found[name], expected[name], rtol=2e-6, atol=1e-6, err_msg=name)


def test_names_may_differ_by_a_prefix(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base", "gpt2")
    expected = make_adapter(tmp_path / "adapter", base, target_modules=["c_attn"])
    weights = load_file(base / "model.safetensors")
    save_file(
        {name.removeprefix("transformer."): values for name, values in weights.items()}, base / "model.safetensors"
    )
    found = fold(base, tmp_path / "adapter", tmp_path / "out")
    np.testing.assert_allclose(
        found["h.1.attn.c_attn.weight"], expected["transformer.h.1.attn.c_attn.weight"], rtol=1e-6, atol=1e-6
    )


@pytest.mark.parametrize("kind", ["lora", "dora", "dora of an embedding"])
def test_bytes_depend_neither_on_threads_nor_on_blocks(tmp_path: Path, kind: str) -> None:
    # More rows and columns than a chunk and a kernel's tile have.
    base = make_base(tmp_path / "base", hidden_size=1200, intermediate_size=640, num_hidden_layers=1, vocab_size=700)
    make_adapter(tmp_path / "adapter", base, **{"r": 5} | SETTINGS[kind])
    outs = []
    for threads, chunks in ((1, 1), (2, 3)):
        outs.append(tmp_path / f"out{threads}")
        fold(base, tmp_path / "adapter", outs[-1], threads=threads, block_chunks=chunks)
    files = [{file.name: file.read_bytes() for file in out.iterdir()} for out in outs]
    assert files[0] == files[1]


def test_a_recipe_of_adapters_is_the_recipe_of_folded_models(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base")
    models: dict[str, list[str]] = {"refs": [], "folded": []}
    for seed, kind in enumerate(("lora", "dora", "rslora")):
        adapter = tmp_path / kind
        make_adapter(adapter, base, seed=seed, target_modules=["q_proj", "down_proj"], **SETTINGS[kind])
        fold(base, adapter, tmp_path / f"folded-{kind}")
        models["refs"].append(f"{base}+{adapter}")
        models["folded"].append(f"{tmp_path}/folded-{kind}")
    for name, refs in models.items():
        recipe = {
            "merge_method": "ties",
            "base_model": str(base),
            "models": [{"model": ref, "parameters": {"weight": 0.7, "density": 0.4}} for ref in refs],
        }
        plan = build_plan(parse_recipe(json.dumps(recipe)))
        assert Plan.from_json(plan.to_json()) == plan
        run_plan(plan, tmp_path / name)
    first, second = read(tmp_path / "refs"), read(tmp_path / "folded")
    assert first.keys() == second.keys()
    for name in first:
        assert np.array_equal(first[name], second[name]), name
    manifest = json.loads((tmp_path / "refs" / "merge_manifest.json").read_text())
    assert [model["model"] for model in manifest["models"][1:]] == models["refs"]
    assert all("adapter_model.safetensors" in model["files"] for model in manifest["models"][1:])


def test_the_same_base_with_two_adapters_is_two_models(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base")
    for seed in (1, 2):
        make_adapter(tmp_path / f"a{seed}", base, seed=seed, target_modules=["q_proj"])
    both = [f"{base}+{tmp_path}/a{seed}" for seed in (1, 2)]
    stack = [{"sources": [{"model": ref, "layer_range": [place, place + 1]}]} for place, ref in enumerate(both)]
    run_plan(build_plan(parse_recipe(json.dumps({"merge_method": "passthrough", "slices": stack}))), tmp_path / "out")
    found = read(tmp_path / "out")
    for place, seed in enumerate((1, 2)):
        name = f"model.layers.{place}.self_attn.q_proj.weight"
        assert np.array_equal(found[name], fold(base, tmp_path / f"a{seed}", tmp_path / f"out{seed}")[name])


def test_mergekits_mapping_and_its_override_are_read(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base")
    make_adapter(tmp_path / "adapter", base, target_modules=["q_proj"])
    model = {
        "model": {"path": str(base)},
        "lora": {"path": str(tmp_path / "adapter")},
        "override_architecture": "MistralForCausalLM",
    }
    plan = build_plan(parse_recipe(json.dumps({"merge_method": "passthrough", "models": [{"model": model}]})))
    assert any("override_architecture has no effect" in note for note in plan.notes)
    assert sum(isinstance(ref, Derived) for step in plan.steps for ref in step.inputs) == 2


def test_a_torch_pickle_is_the_same_adapter(tmp_path: Path) -> None:
    import torch

    base = make_base(tmp_path / "base")
    adapter = tmp_path / "adapter"
    make_adapter(adapter, base, target_modules=["q_proj"])
    expected = fold(base, adapter, tmp_path / "expected")
    weights = load_file(adapter / "adapter_model.safetensors")
    (adapter / "adapter_model.safetensors").unlink()
    renamed = {name.replace(".weight", ".default.weight"): torch.from_numpy(values) for name, values in weights.items()}
    torch.save(renamed, adapter / "adapter_model.bin")
    found = fold(base, adapter, tmp_path / "out")
    assert all(np.array_equal(found[name], expected[name]) for name in expected)


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


@pytest.mark.parametrize("kind", ["lora", "dora", "dora of an embedding", "trained tokens"])
def test_any_range_of_a_folded_tensor_can_be_read(tmp_path: Path, kind: str) -> None:
    base = make_base(tmp_path / "base")
    make_adapter(tmp_path / "adapter", base, **SETTINGS[kind])
    plan = plan_of(f"{base}+{tmp_path}/adapter")
    refs = [source for step in plan.steps for source in step.sources if isinstance(source, Derived)]
    assert refs
    with SourceReader(file for model in plan.models for file in model.files) as reader:
        for ref in refs:
            whole = np.empty(ref.size, np.float32)
            reader.read_values(ref, 0, whole)
            for start, stop in ((0, 1), (5, 70), (31, 33), (ref.size - 3, ref.size)):
                part = np.empty(stop - start, np.float32)
                reader.read_values(ref, start, part)
                assert np.array_equal(part, whole[start:stop]), (ref.name, start)


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
