"""Adapters that are no LoRA are folded as PEFT folds them, whatever is asked for at once."""

from __future__ import annotations

import copy
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from adapter_files import fold, make_base, plan_of, read
from safetensors.numpy import load_file, save_file

from merge.adapter_kinds import KINDS
from merge.checkpoint.reader import SourceReader
from merge.errors import CheckpointError
from merge.plan import Derived

pytestmark = pytest.mark.filterwarnings("ignore")  # what transformers and peft warn of is not ours
LINEAR = ["q_proj", "v_proj", "down_proj"]

# name -> (class of peft's config, its settings)
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "adalora": ("AdaLoraConfig", {"init_r": 4, "target_r": 2, "total_step": 10, "lora_alpha": 6}),
    "boft": ("BOFTConfig", {"boft_block_size": 4}),
    "c3a": ("C3AConfig", {"block_size": 8}),
    "delora": ("DeloraConfig", {"r": 3}),
    "fourierft": ("FourierFTConfig", {"n_frequency": 20}),
    "hira": ("HiraConfig", {"r": 3}),
    "hra": ("HRAConfig", {"r": 4}),
    "hra, orthogonal": ("HRAConfig", {"r": 3, "apply_GS": True}),
    "ia3": ("IA3Config", {"feedforward_modules": ["down_proj"]}),
    "loha": ("LoHaConfig", {"r": 3, "alpha": 5, "rank_pattern": {"v_proj": 2}, "alpha_pattern": {"q_proj": 7}}),
    "lokr": ("LoKrConfig", {"r": 2, "alpha": 5}),
    "lokr, both decomposed": ("LoKrConfig", {"r": 1, "alpha": 3, "decompose_both": True, "decompose_factor": 4}),
    "lokr, whole": ("LoKrConfig", {"r": 64, "alpha": 3}),
    "miss": ("MissConfig", {"r": 4}),
    "miss, not divided": ("MissConfig", {"r": 5}),
    "miss, bat": ("MissConfig", {"r": 4, "init_weights": "bat"}),
    "miss, mini": ("MissConfig", {"r": 4, "mini_r": 8, "init_weights": "mini"}),
    "oft": ("OFTConfig", {"oft_block_size": 8}),
    "oft, exact": ("OFTConfig", {"r": 4, "oft_block_size": 0, "use_cayley_neumann": False}),
    "oft, shared and held": ("OFTConfig", {"oft_block_size": 8, "block_share": True, "coft": True, "eps": 0.3}),
    "oft, two terms": ("OFTConfig", {"oft_block_size": 4, "num_cayley_neumann_terms": 2}),
    "road 1": ("RoadConfig", {"variant": "road_1", "group_size": 8}),
    "road 2": ("RoadConfig", {"variant": "road_2", "group_size": 4}),
    "road 4": ("RoadConfig", {"variant": "road_4", "group_size": 16}),
    "vblora": ("VBLoRAConfig", {"r": 3, "num_vectors": 9, "vector_length": 8, "topk": 3}),
    "vera": ("VeraConfig", {"r": 4}),
    "norms": ("LNTuningConfig", {"target_modules": ["input_layernorm", "norm"]}),
    "tokens": ("TrainableTokensConfig", {"token_indices": [3, 0, 39], "target_modules": ["embed_tokens"]}),
    "pissa": ("LoraConfig", {"r": 4, "lora_alpha": 6, "init_lora_weights": "pissa"}),
    "olora": ("LoraConfig", {"r": 4, "lora_alpha": 6, "init_lora_weights": "olora"}),
    "a bias in B": ("LoraConfig", {"r": 4, "lora_alpha": 6, "lora_bias": True}),
}


def make(
    path: Path, base: Path, config: str, settings: dict[str, Any], dtype: str = "float32"
) -> dict[str, np.ndarray]:
    """An adapter of random numbers as PEFT saves it; returns what merge_and_unload makes of the base."""
    import peft
    import torch
    from transformers import AutoModelForCausalLM

    settings = {"target_modules": LINEAR, "task_type": "CAUSAL_LM"} | settings
    model = AutoModelForCausalLM.from_pretrained(base, dtype=getattr(torch, dtype))
    made = peft.get_peft_model(copy.deepcopy(model), getattr(peft, config)(**settings))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in made.parameters():
            if parameter.requires_grad:
                parameter += (0.2 * torch.randn(parameter.shape, generator=generator)).to(parameter.dtype)
    made.save_pretrained(path)
    merged = peft.PeftModel.from_pretrained(model, path).merge_and_unload()  # from the file, as anybody gets it
    return {name: each.detach().float().numpy().copy() for name, each in merged.state_dict().items()}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_base(tmp_path_factory.mktemp("base"), attention_bias=True, mlp_bias=True)


Made = Callable[[str], tuple[Path, dict[str, np.ndarray]]]


@pytest.fixture(scope="module")
def made(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Made:
    """An adapter on `base`, and what PEFT makes of it; each is made once."""
    known: dict[str, tuple[Path, dict[str, np.ndarray]]] = {}

    def get(name: str) -> tuple[Path, dict[str, np.ndarray]]:
        if name not in known:
            path = tmp_path_factory.mktemp("adapter")
            known[name] = path, make(path, base, *CASES[name])
        return known[name]

    return get


@pytest.mark.parametrize("name", CASES)
def test_an_adapter_of_each_kind_is_folded_as_peft_folds_it(base: Path, tmp_path: Path, made: Made, name: str) -> None:
    adapter, expected = made(name)
    found, before = fold(base, adapter, tmp_path / "out"), read(base)
    changed = [key for key in before if not np.array_equal(found[key], before[key])]
    assert changed
    assert found.keys() == expected.keys()
    for key in found:
        if key in changed:
            np.testing.assert_allclose(found[key], expected[key], rtol=2e-5, atol=2e-5, err_msg=key)
        else:
            assert np.array_equal(found[key], expected[key]), key


def test_every_kind_has_a_case() -> None:
    kinds = {config.removesuffix("Config").upper() for config, _ in CASES.values()}
    assert set(KINDS) <= kinds


@pytest.mark.parametrize("name", ["ia3", "fourierft", "vera"])
def test_matrices_stored_by_input_are_changed_turned(tmp_path: Path, name: str) -> None:
    base = make_base(tmp_path / "base", "gpt2")
    config, settings = CASES[name]
    targets: dict[str, Any] = {"target_modules": ["c_attn", "c_proj", "c_fc"]}
    if name == "ia3":
        targets["feedforward_modules"] = ["c_proj"]
    expected = make(tmp_path / "adapter", base, config, settings | targets)
    found = fold(base, tmp_path / "adapter", tmp_path / "out")
    for key in found:
        np.testing.assert_allclose(found[key], expected[key], rtol=2e-5, atol=2e-5, err_msg=key)


WIDE = {
    "hidden_size": 640,
    "intermediate_size": 320,
    "num_hidden_layers": 1,
    "num_attention_heads": 8,
    "vocab_size": 40,
}
BLOCKED = ("boft", "c3a", "fourierft", "hra", "ia3", "lokr", "loha", "miss, bat", "oft", "road 2", "vera", "pissa")


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """More rows and columns than a chunk and a kernel's tile have."""
    return make_base(tmp_path_factory.mktemp("wide"), attention_bias=True, **WIDE)


@pytest.mark.parametrize("name", BLOCKED)
def test_bytes_depend_neither_on_threads_nor_on_blocks(wide: Path, tmp_path: Path, name: str) -> None:
    make(tmp_path / "adapter", wide, *CASES[name])
    outs = []
    for threads, chunks in ((1, 1), (2, 3)):
        outs.append(tmp_path / f"out{threads}")
        fold(wide, tmp_path / "adapter", outs[-1], threads=threads, block_chunks=chunks)
    files = [{file.name: file.read_bytes() for file in out.iterdir()} for out in outs]
    assert files[0] == files[1]


@pytest.mark.parametrize("name", [name for name in CASES if name not in ("norms", "tokens")])
def test_any_range_of_a_changed_tensor_can_be_read(base: Path, made: Made, name: str) -> None:
    plan = plan_of(f"{base}+{made(name)[0]}")
    refs = [source for step in plan.steps for source in step.sources if isinstance(source, Derived)]
    assert refs
    with SourceReader(file for model in plan.models for file in model.files) as reader:
        for ref in refs:
            whole = np.empty(ref.size, np.float32)
            reader.read_values(ref, 0, whole)
            for start, stop in ((0, 1), (5, 14), (ref.size // 2 - 3, ref.size // 2 + 5), (ref.size - 3, ref.size)):
                piece = np.empty(stop - start, np.float32)
                reader.read_values(ref, start, piece)
                assert np.array_equal(piece, whole[start:stop]), (ref.name, start)


REFUSED = [
    ("ia3", "ia3_l", (7, 1), "ia3_l: expected [32, 1] or [1, 32], found [7, 1]"),
    ("loha", "hada_w1_a", (32, 9), "hada_w1_a: expected [32, 3], found [32, 9]"),
    ("loha", "hada_t1", (3, 3, 1, 1), "hada_t1: a part of an adapter that is not known here"),
    ("lokr", "lokr_w1", (3, 3), "lokr_w1 and lokr_w2: expected factors of [32, 32]"),
    ("oft", "oft_R.weight", (5, 28), "oft_R: expected the upper triangles of blocks along 32 inputs"),
    ("boft", "boft_R", (2, 8, 4, 4), "boft_R: 2 butterfly factors, which PEFT can fold only on CUDA"),
    ("hra", "hra_u", (31, 4), "hra_u: expected [32, r], found [31, 4]"),
    ("c3a", "c3a_kernel", (3, 4, 8), "c3a_kernel: expected blocks of a matrix of [32, 32]"),
    ("vera", "vera_lambda_d", (5,), "vera_lambda_d: expected [4], found [5]"),
    ("road 1", "road_theta", (5,), "road_theta: expected [16], found [5]"),
    ("adalora", "lora_E", (5, 1), "lora_E: expected [4, 1], found [5, 1]"),
    ("vblora", "vblora_logits_A", (3, 4, 5), "vblora_logits_A: expected [3, 4, 9], found [3, 4, 5]"),
    ("fourierft", "fourierft_spectrum", (2, 3), "fourierft_spectrum: expected a vector, found [2, 3]"),
    ("delora", "delora_w_norm", (3,), "delora_w_norm: expected [32], found [3]"),
    ("hira", "hira_B", (32, 5), "hira_B: expected [32, 3], found [32, 5]"),
    ("miss", "miss_block", (4, 31), "miss_block: expected [4, 32], found [4, 31]"),
]


@pytest.mark.parametrize(
    ("name", "part", "shape", "message"), REFUSED, ids=[f"{case[0]} {case[1]}" for case in REFUSED]
)
def test_tensors_that_do_not_fit_are_refused_by_name(
    base: Path, tmp_path: Path, made: Made, name: str, part: str, shape: tuple[int, ...], message: str
) -> None:
    shutil.copytree(made(name)[0], tmp_path, dirs_exist_ok=True)
    weights = load_file(tmp_path / "adapter_model.safetensors")
    weights[f"base_model.model.model.layers.0.self_attn.q_proj.{part}"] = np.ones(shape, "float32")
    save_file(weights, tmp_path / "adapter_model.safetensors")
    with pytest.raises(CheckpointError) as caught:
        plan_of(f"{base}+{tmp_path}")
    assert message in str(caught.value)
    assert str(tmp_path) in str(caught.value)


def test_an_adapter_in_bfloat16_is_folded_into_a_model_in_bfloat16(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base", dtype="bfloat16")
    for name in ("loha", "oft", "pissa"):
        config, settings = CASES[name]
        expected = make(tmp_path / name, base, config, settings, "bfloat16")
        found = fold(base, tmp_path / name, tmp_path / f"{name}-out")
        for key in found:
            np.testing.assert_allclose(found[key], expected[key], rtol=2.0**-6, atol=2.0**-8, err_msg=f"{name} {key}")
