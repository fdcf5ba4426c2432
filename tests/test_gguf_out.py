"""merge convert X -o model.gguf: what is in the file, and what llama.cpp makes of it (make test-full)."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import Output, write_json
from ggufs_of import small_model
from safetensors.numpy import load_file, save_file

from merge.errors import NumbersError, UsageError
from merge.tools.to_gguf.types import TYPES
from merge.tools.to_gguf.vocabulary import _scores
from merge.tools.to_gguf.write import write_gguf

gguf = pytest.importorskip("gguf")
JUDGE = Path(__file__).parent / "llama_cpp" / "judge.mjs"


def tensors_of(path: Path) -> dict[str, Any]:
    return {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}


def numbers(tensor: Any) -> np.ndarray:
    return gguf.quants.dequantize(tensor.data, tensor.tensor_type)


def metadata(path: Path, key: str) -> Any:
    field = gguf.GGUFReader(path).fields.get(key)
    return None if field is None else field.contents()


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_model(tmp_path_factory.mktemp("gguf") / "llama")


def stored(path: Path) -> dict[str, np.ndarray]:
    return load_file(path / "model.safetensors")


def test_every_tensor_is_there_under_its_name(llama: Path, tmp_path: Path) -> None:
    write_gguf(str(llama), tmp_path / "m.gguf", "f32")
    found, expected = tensors_of(tmp_path / "m.gguf"), stored(llama)
    assert len(found) == len(expected)
    for name, theirs in (
        ("token_embd.weight", "model.embed_tokens.weight"),
        ("blk.2.ffn_down.weight", "model.layers.2.mlp.down_proj.weight"),
        ("blk.0.attn_v.weight", "model.layers.0.self_attn.v_proj.weight"),
        ("output_norm.weight", "model.norm.weight"),
        ("output.weight", "lm_head.weight"),
    ):
        np.testing.assert_array_equal(numbers(found[name]), expected[theirs])


def test_rows_of_queries_and_keys_change_places_as_llama_cpp_rotates_them(llama: Path, tmp_path: Path) -> None:
    write_gguf(str(llama), tmp_path / "m.gguf", "f32")
    found, expected = tensors_of(tmp_path / "m.gguf"), stored(llama)
    for name, theirs in (("attn_q", "q_proj"), ("attn_k", "k_proj")):
        ours = numbers(found[f"blk.1.{name}.weight"])
        rows = expected[f"model.layers.1.self_attn.{theirs}.weight"]
        for head in range(len(rows) // 32):
            for place in range(16):
                np.testing.assert_array_equal(ours[head * 32 + 2 * place], rows[head * 32 + place])
                np.testing.assert_array_equal(ours[head * 32 + 2 * place + 1], rows[head * 32 + 16 + place])


@pytest.mark.parametrize("to", TYPES)
def test_numbers_are_what_gguf_py_makes_of_them(llama: Path, tmp_path: Path, to: str) -> None:
    write_gguf(str(llama), tmp_path / "m.gguf", to)
    tensor, expected = tensors_of(tmp_path / "m.gguf")["blk.0.ffn_gate.weight"], stored(llama)
    kind = gguf.GGMLQuantizationType[TYPES[to][0]]
    assert tensor.tensor_type == kind
    whole = gguf.quants.quantize(expected["model.layers.0.mlp.gate_proj.weight"], kind)
    np.testing.assert_array_equal(np.asarray(tensor.data).view(np.uint8), whole.view(np.uint8))
    assert tensors_of(tmp_path / "m.gguf")["blk.0.attn_norm.weight"].tensor_type == gguf.GGMLQuantizationType.F32


def test_metadata_say_what_the_config_says(llama: Path, tmp_path: Path) -> None:
    write_gguf(str(llama), out := tmp_path / "m.gguf", "q8_0")
    assert metadata(out, "general.architecture") == "llama"
    assert metadata(out, "general.file_type") == 7
    assert [
        metadata(out, f"llama.{key}")
        for key in ("block_count", "embedding_length", "attention.head_count_kv", "rope.dimension_count", "vocab_size")
    ] == [3, 64, 1, 32, 260]
    assert metadata(out, "tokenizer.ggml.pre") == "gpt-2"
    assert metadata(out, "tokenizer.ggml.merges") == ["t h"]
    assert metadata(out, "tokenizer.ggml.eos_token_id") == 257
    assert metadata(out, "tokenizer.ggml.tokens")[256:] == ["th", "<end>", "[PAD258]", "[PAD259]"]
    assert metadata(out, "tokenizer.ggml.token_type")[255:] == [1, 1, 3, 5, 5]
    assert "passthrough" in metadata(out, "merge_workbench.recipe")


def test_a_recipe_is_merged_into_the_file_in_one_pass(llama: Path, tmp_path: Path) -> None:
    """The same tensors as of the merged checkpoint, and nothing else is written."""
    from merge import build_plan, load_recipe, run_plan

    for seed, name in enumerate("ab"):
        shutil.copytree(llama, tmp_path / name)
        noise = np.random.default_rng(seed)
        changed = {key: value + 0.01 * noise.standard_normal(value.shape) for key, value in stored(llama).items()}
        save_file(
            {key: value.astype(np.float32) for key, value in changed.items()}, tmp_path / name / "model.safetensors"
        )
    recipe = tmp_path / "r.yaml"
    recipe.write_text(
        f"merge_method: ties\nbase_model: {llama}\ndtype: bfloat16\nparameters: {{density: 0.5, weight: 0.5}}\n"
        f"models: [{{model: {tmp_path / 'a'}}}, {{model: {tmp_path / 'b'}}}]\n"
    )
    run_plan(build_plan(load_recipe(recipe)), tmp_path / "merged")
    write_gguf(str(tmp_path / "merged"), tmp_path / "two.gguf", "q8_0")
    write_gguf(str(recipe), tmp_path / "one.gguf", "q8_0", threads=3)
    ours, theirs = tensors_of(tmp_path / "one.gguf"), tensors_of(tmp_path / "two.gguf")
    assert sorted(ours) == sorted(theirs)
    for name in ours:
        np.testing.assert_array_equal(ours[name].data, theirs[name].data)
    assert not list(tmp_path.glob("*.partial")) + list(tmp_path.glob("*.finished"))


def test_experts_of_a_layer_are_one_tensor(tmp_path: Path) -> None:
    path = small_model(tmp_path / "m", "Mixtral", num_local_experts=4, num_experts_per_tok=2)
    write_gguf(str(path), tmp_path / "m.gguf", "f32")
    found, expected = tensors_of(tmp_path / "m.gguf"), stored(path)
    ours = numbers(found["blk.1.ffn_down_exps.weight"])
    assert ours.shape == (4, 64, 96)
    np.testing.assert_array_equal(ours[3], expected["model.layers.1.block_sparse_moe.experts.3.w2.weight"])


def test_scores_follow_the_merges() -> None:
    merges = ["a b", "ab c", "b c"]
    assert _scores({"merges": merges}, ["a", "bc", "abc", "ab"]) == [-3.0, -2.0, -1.0, 0.0]


def broken(path: Path, change: str) -> None:
    config, tokenizer = json.loads((path / "config.json").read_text()), path / "tokenizer.json"
    text = json.loads(tokenizer.read_text())
    match change:
        case "class":
            write_json(path / "config.json", config | {"architectures": ["GPT2LMHeadModel"]})
        case "no tokenizer":
            tokenizer.unlink()
        case "wordpiece":
            write_json(tokenizer, text | {"model": {"type": "WordPiece", "vocab": {"a": 0}}})
        case "splits":
            write_json(tokenizer, text | {"pre_tokenizer": {"type": "Whitespace"}})
        case "rope":
            write_json(path / "config.json", config | {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4}})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("class", "architectures: found 'GPT2LMHeadModel'; GGUF files are written for Gemma2ForCausalLM"),
        ("no tokenizer", "no tokenizer.json; a GGUF file contains its tokenizer"),
        ("wordpiece", "model 'WordPiece': only BPE tokenizers"),
        ("splits", "llama.cpp's name of this way of splitting is not known here (found 'Whitespace')"),
        ("rope", "rope_type 'dynamic': expected default, linear, yarn, llama3 or longrope"),
    ],
)
def test_what_cannot_be_written_is_one_clear_error(llama: Path, tmp_path: Path, change: str, message: str) -> None:
    shutil.copytree(llama, tmp_path / "m")
    broken(tmp_path / "m", change)
    with pytest.raises(UsageError) as error:
        write_gguf(str(tmp_path / "m"), tmp_path / "m.gguf")
    assert message in str(error.value)
    assert not (tmp_path / "m.gguf").exists()


def test_numbers_beyond_float16_name_the_tensor(llama: Path, tmp_path: Path) -> None:
    shutil.copytree(llama, tmp_path / "m")
    tensors = stored(llama)
    tensors["model.layers.1.mlp.up_proj.weight"][3, 5] = 1e6
    save_file(tensors, tmp_path / "m" / "model.safetensors")
    with pytest.raises(NumbersError, match=r"model.layers.1.mlp.up_proj.weight: values beyond float16; use --to bf16"):
        write_gguf(str(tmp_path / "m"), tmp_path / "m.gguf", "f16")
    write_gguf(str(tmp_path / "m"), tmp_path / "m.gguf", "bf16")


def test_the_command(llama: Path, tmp_path: Path, call_cli: Callable[..., Output]) -> None:
    done = call_cli(["convert", llama, "-o", "m.gguf", "--to", "q4_0"], cwd=tmp_path)
    assert done.code == 0
    assert done.stdout.startswith("m.gguf: 30 tensors (2 Q8_0")
    assert call_cli(["convert", llama, "-o", "m.gguf"], cwd=tmp_path).code == 2  # it exists
    assert (
        json.loads(call_cli(["convert", llama, "-o", "m.gguf", "--force", "--json"], cwd=tmp_path).stdout)["to"]
        == "f16"
    )
    for arguments, message in (
        (["-o", "folder", "--to", "q8_0"], "--to: expected an --out that ends in .gguf"),
        (["-o", "x.gguf", "--to", "q4_k_m"], '--to "q4_k_m": expected f32, f16'),
        (["-o", "x.gguf", "--dtype", "bf16"], "--dtype: a GGUF file takes --to."),
    ):
        done = call_cli(["convert", llama, *arguments], cwd=tmp_path)
        assert (done.code, message in done.stderr) == (2, True), done.stderr


# llama.cpp itself: NODE_LLAMA is a folder where `npm install node-llama-cpp` was run.

FAMILIES: dict[str, dict[str, Any]] = {
    "Llama": {},
    "Llama 3": {"kind": "Llama", "max_position_embeddings": 512}
    | {
        "rope_parameters": {"rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0}
        | {"high_freq_factor": 4.0, "original_max_position_embeddings": 64}
    },
    "Mistral": {"sliding_window": None},
    "Mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "Granite": {"attention_multiplier": 0.2, "embedding_multiplier": 3.0, "residual_multiplier": 0.5}
    | {"logits_scaling": 2.0},
    "SmolLM3": {"num_hidden_layers": 4, "pad_token_id": 0},
    "Qwen2": {},
    "Qwen3": {},
    "Qwen2Moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "decoder_sparse_step": 1}
    | {"shared_expert_intermediate_size": 32},
    "Qwen3Moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "norm_topk_prob": True},
    "Gemma2": {"tie_word_embeddings": True, "query_pre_attn_scalar": 32, "sliding_window": 32},
    "Gemma3Text": {"query_pre_attn_scalar": 32, "sliding_window": 32, "num_hidden_layers": 6},
    "Phi3": {"pad_token_id": 0},
}


@pytest.mark.full
@pytest.mark.skipif("NODE_LLAMA" not in os.environ, reason="NODE_LLAMA: a folder with node-llama-cpp")
@pytest.mark.parametrize("name", FAMILIES)
def test_llama_cpp_computes_what_transformers_computes(name: str, tmp_path: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    settings = dict(FAMILIES[name])
    path = small_model(tmp_path / "m", settings.pop("kind", name), **settings)
    write_gguf(str(path), tmp_path / "m.gguf", "f32")
    texts = [np.random.default_rng(seed).integers(0, 256, 40).tolist() for seed in range(2)]
    answer = judged(tmp_path / "m.gguf", {"texts": texts, "ids": True})
    network = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    for ids, found in zip(texts, answer["nll"], strict=True):
        with torch.no_grad():
            logits = torch.log_softmax(network(torch.tensor([ids])).logits[0].double(), -1)
        expected = -logits[:-1].gather(1, torch.tensor(ids[1:])[:, None]).mean()
        assert found == pytest.approx(float(expected), abs=2e-3), name


def judged(path: Path, asked: dict[str, Any]) -> dict[str, Any]:
    done = subprocess.run(
        ["node", JUDGE, path], input=json.dumps(asked), capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return dict(json.loads(done.stdout.strip().splitlines()[-1]))
