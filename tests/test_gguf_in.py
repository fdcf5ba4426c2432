"""GGUF files as models: the tensors, config and tokenizer of the checkpoint that they were made of."""

from __future__ import annotations

import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import Output, write_json
from ggufs_of import small_model
from safetensors.numpy import load_file

from merge import build_plan, load_recipe, parse_recipe, run_plan
from merge.checkpoint import Checkpoint, open_checkpoint
from merge.checkpoint.gguf_header import read_gguf_header
from merge.checkpoint.gguf_tokenizer import tokenizer_files
from merge.checkpoint.reader import SourceReader
from merge.errors import CheckpointError, RecipeError
from merge.recipe.model import ModelRef
from merge.tools.to_gguf.types import TYPES
from merge.tools.to_gguf.vocabulary import _scores
from merge.tools.to_gguf.write import write_gguf

gguf = pytest.importorskip("gguf")
FAMILIES: dict[str, dict[str, Any]] = {
    "Llama": {},
    "Llama 3": {
        "rope_parameters": {"rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0}
        | {"high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
    },
    "Mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "Granite": {"attention_multiplier": 0.25, "embedding_multiplier": 3.0, "logits_scaling": 2.0},
    "SmolLM3": {"num_hidden_layers": 4, "pad_token_id": 0},
    "Qwen2": {},
    "Qwen3": {},
    "Qwen2Moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "decoder_sparse_step": 1}
    | {"shared_expert_intermediate_size": 32},
    "Qwen3Moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "norm_topk_prob": True},
    "Gemma2": {"query_pre_attn_scalar": 32, "sliding_window": 32, "tie_word_embeddings": True},
    "Gemma3Text": {"query_pre_attn_scalar": 32, "sliding_window": 32, "num_hidden_layers": 6},
    "Phi3": {"pad_token_id": 0},
}


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_model(tmp_path_factory.mktemp("gguf") / "llama")


def opened(path: Path) -> Checkpoint:
    return open_checkpoint(ModelRef(path.name, str(path)))


def read(checkpoint: Checkpoint, name: str) -> np.ndarray:
    ref = checkpoint.tensors[name]
    out = np.empty(ref.size, np.float32)
    with SourceReader(checkpoint.files) as reader:
        reader.read_values(ref, 0, out)
    return out.reshape(ref.shape)


@pytest.mark.parametrize("name", FAMILIES)
def test_a_file_written_here_is_the_checkpoint_that_it_was_made_of(name: str, tmp_path: Path) -> None:
    """Every tensor bit for bit, and a config of the same class with the same numbers."""
    from transformers import AutoConfig

    path = small_model(tmp_path / "m", name.split()[0], **FAMILIES[name])
    write_gguf(str(path), tmp_path / "m.gguf", "f32")
    found, expected = opened(tmp_path / "m.gguf"), load_file(path / "model.safetensors")
    assert sorted(found.tensors) == sorted(expected)
    for tensor, values in expected.items():
        ours = read(found, tensor)
        if "norm" in tensor and name.startswith("Gemma"):  # 1 is added and taken away in float32
            np.testing.assert_allclose(ours, values, atol=1e-6)
        else:
            np.testing.assert_array_equal(ours, values)
    before, after = (AutoConfig.from_pretrained(each) for each in (path, found.path))
    assert type(before) is type(after)
    for key in ("hidden_size", "num_key_value_heads", "head_dim", "vocab_size", "num_hidden_layers", "eos_token_id"):
        assert getattr(before, key, None) == getattr(after, key, None), key
    assert after.rms_norm_eps == before.rms_norm_eps
    if name.startswith("Llama"):
        assert after.rope_parameters == before.rope_parameters


@pytest.mark.parametrize("to", TYPES)
def test_blocks_are_decoded_as_gguf_py_does_wherever_a_block_begins(llama: Path, tmp_path: Path, to: str) -> None:
    write_gguf(str(llama), tmp_path / "m.gguf", to)
    checkpoint = opened(tmp_path / "m.gguf")
    reader = gguf.GGUFReader(tmp_path / "m.gguf")
    theirs = {tensor.name: gguf.quants.dequantize(tensor.data, tensor.tensor_type) for tensor in reader.tensors}
    whole = read(checkpoint, "model.layers.1.mlp.down_proj.weight")
    np.testing.assert_array_equal(whole, theirs["blk.1.ffn_down.weight"])
    rotated = read(checkpoint, "model.layers.1.self_attn.q_proj.weight")
    by_turns = theirs["blk.1.attn_q.weight"]
    np.testing.assert_array_equal(rotated[:16], by_turns[0:32:2])
    np.testing.assert_array_equal(rotated[16:32], by_turns[1:32:2])
    with SourceReader(checkpoint.files) as source:
        for values, name in ((whole, "mlp.down_proj"), (rotated, "self_attn.q_proj")):
            ref = checkpoint.tensors[f"model.layers.1.{name}.weight"]
            for start, n in ((0, 1), (1, 130), (70, 2000), (ref.size - 5, 5)):
                out = np.empty(n, np.float32)
                source.read_values(ref, start, out)
                np.testing.assert_array_equal(out, values.reshape(-1)[start : start + n])


def test_the_tokenizer_is_the_same(llama: Path, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    write_gguf(str(llama), tmp_path / "m.gguf", "q8_0")
    before, after = (AutoTokenizer.from_pretrained(each) for each in (llama, opened(tmp_path / "m.gguf").path))
    text = "the path, thither: 12\n\n ünï 漢<end> th"
    assert after(text).input_ids == before(text).input_ids
    assert (after.eos_token, after.decode(after(text).input_ids)) == ("<end>", before.decode(before(text).input_ids))


def test_a_tokenizer_of_pieces_merges_as_before(tmp_path: Path) -> None:
    """The scores that are written give the merges that they were made of."""
    from tokenizers import Tokenizer

    pieces = ["<unk>", "<s>", "</s>", "<0x21>", "▁", "a", "b", "c", "ab", "▁a", "bc", "abc", "▁ab"]
    merges = ["a b", "▁ a", "b c", "ab c", "▁ ab"]
    types = [2, 3, 3, 6, *[1] * 9]
    metadata: dict[str, Any] = {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": pieces,
        "tokenizer.ggml.token_type": types,
        "tokenizer.ggml.scores": _scores({"merges": merges}, pieces),
        "tokenizer.ggml.add_space_prefix": True,
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.add_bos_token": True,
    }
    tokenizer = Tokenizer.from_str(tokenizer_files("m.gguf", metadata)["tokenizer.json"])
    assert tokenizer.encode("abc ab!").tokens == ["<s>", "▁", "abc", "▁ab", "<0x21>"]


def test_files_are_merged_with_models_and_adapters(llama: Path, tmp_path: Path) -> None:
    import torch
    from safetensors.torch import save_file

    write_gguf(str(llama), tmp_path / "m.gguf", "q8_0")
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    write_json(
        adapter / "adapter_config.json", {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj"]}
    )
    prefix = "base_model.model.model.layers.0.self_attn.q_proj"
    a, b = torch.randn(2, 64), torch.randn(64, 2) * 0.1
    save_file({f"{prefix}.lora_A.weight": a, f"{prefix}.lora_B.weight": b}, adapter / "adapter_model.safetensors")
    recipe = tmp_path / "r.yaml"
    recipe.write_text(
        "merge_method: linear\ndtype: float32\nmodels:\n"
        f"- {{model: m.gguf+adapter, parameters: {{weight: 0.5}}}}\n- {{model: {llama}, parameters: {{weight: 0.5}}}}\n"
    )
    run_plan(build_plan(load_recipe(recipe)), tmp_path / "out")
    merged, exact = load_file(tmp_path / "out" / "model.safetensors"), load_file(llama / "model.safetensors")
    decoded = read(opened(tmp_path / "m.gguf"), f"{prefix[17:]}.weight") + (2 * (b @ a)).numpy()
    np.testing.assert_allclose(
        merged[f"{prefix[17:]}.weight"], (decoded + exact[f"{prefix[17:]}.weight"]) / 2, atol=1e-6
    )
    assert (tmp_path / "out" / "tokenizer.json").is_file()


def test_a_file_becomes_another_in_one_command(llama: Path, tmp_path: Path, call_cli: Callable[..., Output]) -> None:
    write_gguf(str(llama), tmp_path / "m.gguf", "f16")
    assert call_cli(["convert", "m.gguf", "-o", "q.gguf", "--to", "q8_0"], cwd=tmp_path).code == 0
    write_gguf(str(llama), tmp_path / "direct.gguf", "q8_0")
    ours, direct = (
        {tensor.name: tensor for tensor in gguf.GGUFReader(tmp_path / name).tensors}
        for name in ("q.gguf", "direct.gguf")
    )
    for name, tensor in direct.items():
        assert ours[name].tensor_type == tensor.tensor_type
        if "norm" in name:  # float32 in both
            np.testing.assert_array_equal(ours[name].data, tensor.data)


@pytest.mark.parametrize(
    ("cut", "message"),
    [
        (lambda data: b"GGML" + data[4:], "does not begin with GGUF"),
        (lambda data: data[:4] + struct.pack("<I", 9) + data[8:], "version 9, expected 2 or 3"),
        (lambda data: data[:100], "it ends within its header"),
        (lambda data: data[:8] + struct.pack("<Q", 2**60) + data[16:], "a count of"),
        (lambda data: data[:-5000], "bytes in the file"),
    ],
)
def test_damaged_files_are_one_clear_error(
    llama: Path, tmp_path: Path, cut: Callable[[bytes], bytes], message: str
) -> None:
    write_gguf(str(llama), tmp_path / "m.gguf", "q8_0")
    (tmp_path / "m.gguf").write_bytes(cut((tmp_path / "m.gguf").read_bytes()))
    with pytest.raises((CheckpointError, RecipeError)) as error:
        build_plan(parse_recipe(f"merge_method: passthrough\nmodels: [{{model: {tmp_path / 'm.gguf'}}}]\n"))
    assert message in str(error.value)


def test_headers_are_read_without_the_package(llama: Path, tmp_path: Path) -> None:
    write_gguf(str(llama), tmp_path / "m.gguf", "q4_0")
    header, reader = read_gguf_header(str(tmp_path / "m.gguf")), gguf.GGUFReader(tmp_path / "m.gguf")
    assert [(entry.name, entry.offset, entry.kind) for entry in header.tensors] == [
        (tensor.name, tensor.data_offset, int(tensor.tensor_type)) for tensor in reader.tensors
    ]
    assert header.metadata == {
        key: field.contents() for key, field in reader.fields.items() if not key.startswith("GGUF.")
    }
