"""Models run one decoder layer at a time give what they give as a whole, and take the memory of one layer."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import build, names, tiny
from conftest import write_safetensors
from mixture_models import SIZES, dense, mixture
from safetensors.numpy import load_file

import merge.layerwise.weights
from merge.checkpoint import open_checkpoint
from merge.checkpoint.reader import SourceReader
from merge.errors import CheckpointError
from merge.layerwise import LayerRunner, open_runner, whole_model
from merge.loading import trusting
from merge.recipe.references import parse_reference

TOKENS = torch.tensor([[3, 9, 4, 11, 29, 2, 7, 8, 30, 31, 5, 12, 13], [2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 1]])
PAGE = (Path(__file__).parent.parent / "docs" / "architectures.md").read_text(encoding="utf-8")
STREAMED = re.findall(r"^\| (\S+) \|.* streamed \|$", PAGE, re.MULTILINE)
# Between them: stacked and transposed experts, tuples as results, positions and projections outside the layers, states
# of four dimensions, layers of several kinds.
FEW = (
    "llama-tied",
    "mixtral",
    "qwen3_moe",
    "gpt_oss",
    "gemma2",
    "gemma3n_text",
    "falcon",
    "jamba",
    "gpt2",
    "opt",
    "bloom",
)


@contextlib.contextmanager
def runner_of(path: Path) -> Iterator[tuple[LayerRunner | None, list[str]]]:
    said: list[str] = []
    checkpoint = open_checkpoint(parse_reference(str(path)))
    with SourceReader(checkpoint.files) as reader:
        yield open_runner(checkpoint, reader, None, said.append), said


def logits_of(runner: LayerRunner) -> Any:
    """Of TOKENS, in two blocks of the vocabulary."""
    hidden = runner.embed(TOKENS)
    assert tuple(hidden.shape) == runner.shape(TOKENS)
    for number in range(len(runner.layers)):
        with runner.layer(number) as run:
            hidden = run(TOKENS, hidden)
    parts = []
    for start, stop in ((0, 20), (20, runner.vocabulary)):
        runner.load_head(start, stop)
        parts.append(runner.finish(TOKENS, hidden))
    return torch.cat(parts, -1)


def layer_bytes(runner: LayerRunner) -> int:
    """Float32 bytes of the largest layer, its experts all at once."""
    sizes = [0] * len(runner.layers)
    for slot in runner.weights.all:
        numbers = {runner.layer_of(name) for name in slot.names} - {None}
        for number in numbers:
            sizes[number] += 4 * slot.empty.numel()  # type: ignore[index]
    return max(sizes)


def test_every_decoder_of_the_contract_is_streamed() -> None:
    """By the page, which benchmarks/architecture_contract.py writes."""
    decoders = names()[: names().index("xlnet")]
    assert [name for name in decoders if name not in STREAMED] == ["llama-classifier"]


@pytest.mark.parametrize("name", [pytest.param(n, marks=[] if n in FEW else pytest.mark.full) for n in STREAMED])
def test_a_model_run_layer_by_layer_is_the_whole_one(tmp_path: Path, name: str) -> None:
    build(name).save_pretrained(tmp_path)
    model = whole_model(str(tmp_path))
    with torch.no_grad():
        expected = model(input_ids=TOKENS, use_cache=False).logits
    with runner_of(tmp_path) as (runner, said):
        assert not said
        assert runner is not None
        torch.testing.assert_close(logits_of(runner), expected, rtol=1e-5, atol=1e-6)
        # Beside a layer: what is small and outside of them, and the rows of the tokens in hand.
        rows = 4 * sum(each.embedding_dim for each in model.modules() if isinstance(each, torch.nn.Embedding))
        assert runner.weights.most <= layer_bytes(runner) + runner.weights.held + rows * TOKENS.unique().numel()
        assert all(p.device.type == "meta" for layer in runner.layers for p in layer.parameters())


@pytest.mark.parametrize("name", ["mixtral", "gpt_oss"])
def test_experts_are_read_one_at_a_time(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(merge.layerwise.weights, "EXPERT_BYTES", 0)
    model = build(name)
    model.save_pretrained(tmp_path)
    with torch.no_grad():
        expected = model(input_ids=TOKENS).logits
    with runner_of(tmp_path) as (runner, _):
        assert runner is not None
        torch.testing.assert_close(logits_of(runner), expected, rtol=1e-5, atol=1e-6)
        stacks = sum(4 * slot.empty.numel() for slot in runner.weights.all if len(slot.shape) == 3) // len(
            runner.layers
        )
        assert runner.weights.most < layer_bytes(runner) - stacks // 2


@pytest.mark.full
def test_experts_in_a_list_are_read_one_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """DeepSeek's layout, whose code is beside the weights."""
    model = dense(tmp_path / "dense", "llama")
    mixture(tmp_path / "out", model, "architecture: deepseek\n")
    most = []
    with trusting(str(tmp_path / "out")):
        for limit in (1 << 30, 0):
            monkeypatch.setattr(merge.layerwise.weights, "EXPERT_BYTES", limit)
            with runner_of(tmp_path / "out") as (runner, _):
                assert runner is not None
                logits = logits_of(runner)
                most.append(runner.weights.most)
        with torch.no_grad():
            torch.testing.assert_close(logits, whole_model(str(tmp_path / "out"))(TOKENS).logits, rtol=1e-5, atol=1e-5)
    one_expert = 4 * 3 * SIZES["hidden_size"] * SIZES["intermediate_size"]
    assert most[1] <= most[0] - 3 * one_expert


def test_layers_that_share_keys_and_values_need_the_whole_model(tmp_path: Path) -> None:
    cls, config = tiny("gemma3n_text")
    config.layer_types = ["full_attention", "sliding_attention"] * 2 + ["full_attention"]
    config.num_kv_shared_layers = 2
    cls(config).save_pretrained(tmp_path)
    with runner_of(tmp_path) as (runner, said):
        assert runner is None
        assert said[0].endswith("GB: its layers share a KVSharingDict.")


@pytest.mark.parametrize("change", ["lacks an expert", "has one more"])
def test_experts_that_do_not_fit_are_refused(tmp_path: Path, change: str) -> None:
    build("mixtral").save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    for name in [name for name in tensors if name.startswith("model.layers.1.") and ".experts.3." in name]:
        if change == "lacks an expert":
            del tensors[name]
        else:
            tensors[name.replace(".experts.3.", ".experts.4.")] = tensors[name]
    write_safetensors(file, {name: (value, "float32") for name, value in tensors.items()})
    with (
        pytest.raises(CheckpointError, match=r"model\.layers\.1\.mlp\.experts\.down_proj is \([35], 16, 24\)"),
        runner_of(tmp_path),
    ):
        pass
    with pytest.raises(CheckpointError, match=r"model\.layers\.1\.mlp\.experts"):
        whole_model(str(tmp_path))


def test_a_tensor_of_another_shape_beside_a_strange_one_is_refused(tmp_path: Path) -> None:
    build("llama-tied").save_pretrained(tmp_path)
    file, name = tmp_path / "model.safetensors", "model.layers.1.mlp.up_proj.weight"
    tensors = load_file(file)
    tensors |= {name: tensors[name][:-1].copy(), "model.other.weight": tensors[name]}
    write_safetensors(file, {name: (value, "float32") for name, value in tensors.items()})
    with runner_of(tmp_path) as (runner, said):
        assert runner is None
        assert f"its files do not have {name} as transformers makes it" in said[0]
    with pytest.raises(CheckpointError, match=r"up_proj\.weight is \(23, 16\)"):
        whole_model(str(tmp_path))


def test_a_layer_that_sees_later_tokens_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers.models.llama.modeling_llama import LlamaDecoderLayer

    build("llama-tied").save_pretrained(tmp_path)
    forward = LlamaDecoderLayer.forward

    def both_sides(self: Any, hidden: Any, *arguments: Any, **keywords: Any) -> Any:
        return forward(self, hidden + hidden.mean(1, keepdim=True), *arguments, **keywords)

    monkeypatch.setattr(LlamaDecoderLayer, "forward", both_sides)
    with runner_of(tmp_path) as (runner, _):
        assert runner is not None
        with pytest.raises(CheckpointError, match="its predictions depend on later tokens"):
            logits_of(runner)


def test_a_token_without_a_row_is_named(tmp_path: Path) -> None:
    build("llama-tied").save_pretrained(tmp_path)
    with runner_of(tmp_path) as (runner, _):
        assert runner is not None
        with pytest.raises(CheckpointError, match="its tokenizer has token 48, its embedding 48 rows"):
            runner.embed(torch.tensor([[1, 48]]))
