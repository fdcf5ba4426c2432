"""merge memory: figures of papers and textbooks, and closed forms held against transformers' own code."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import Output, llama_config, write_json
from headers import llama_shapes, write_headers

from merge.errors import UsageError
from merge.tools.memory import Request, estimate
from merge.tools.memory_math import (
    ATTENTION,
    count,
    fits,
    kv_cache_bytes,
    lora_shapes,
    optimizer_bytes,
    parse_count,
    unknown_shapes,
    weight_bytes,
)

LLAMA_2_13B = llama_shapes(layers=40, hidden=5120, intermediate=13824, vocabulary=32000, heads=40, kv_heads=40)


def parts(model: str, **request: Any) -> dict[str, int]:
    return dict(estimate(model, Request(**request)).parts)


def test_13b_in_16_bits_is_26_gb_of_weights_and_31_2_gb_by_the_rule_of_thumb() -> None:
    found = estimate("13B", Request())
    assert dict(found.parts)["weights"] == 26_000_000_000
    assert found.total == 31_200_000_000


def test_adam_on_13b_in_16_bits_is_78_gb_of_gradients_and_states() -> None:
    found = parts("13e9", task="full", dtype="bfloat16")
    assert (found["gradients"], found["optimizer states"]) == (26_000_000_000, 52_000_000_000)


def test_7b_in_16_bits_trains_in_56_gb_before_activations() -> None:
    assert estimate("7B", Request(task="full", dtype="bfloat16")).total == 56_000_000_000


def test_full_training_is_predicted_as_merge_finetune_does_it_in_float32() -> None:
    found = estimate("7B", Request(task="full"))
    assert (found.dtype, found.total) == ("float32", 112_000_000_000)
    assert "in 16 bits throughout, as textbooks count: 56 GB" in found.notes[0]
    assert not [note for note in estimate("7B", Request(task="full", dtype="float32")).notes if "textbooks" in note]


def test_frozen_weights_are_16_bits_on_a_gpu_and_float32_on_cpu() -> None:
    assert [Request(task="lora", device=device).training_dtype for device in ("cuda", "cpu")] == ["bfloat16", "float32"]


def test_mixed_precision_keeps_copies_of_weights_and_smaller_activations(tmp_path: Path) -> None:
    write_json(tmp_path / "config.json", llama_config(4, 64, True, "float32"))
    small, large = (
        {
            device: estimate(str(tmp_path), Request("full", batch=batch, context=32, device=device))
            for device in ("cpu", "cuda")
        }
        for batch in (1, 64)
    )
    growth = {device: large[device].total - small[device].total for device in ("cpu", "cuda")}
    assert growth["cuda"] < growth["cpu"]


def test_experts_in_one_tensor_stay_in_16_bits_under_qlora(tmp_path: Path) -> None:
    from transformers import MixtralConfig

    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "vocab_size": 64}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    MixtralConfig(**sizes, **heads, num_local_experts=4, num_experts_per_tok=1).save_pretrained(tmp_path)
    found = estimate(str(tmp_path), Request("qlora", batch=1, context=8))
    experts = 2 * 4 * 3 * 64 * 128
    assert dict(found.parts)["experts, frozen, not quantised: 16 bits"] == 2 * experts
    assert (
        found.notes[0] == f"mixture of experts: {found.parameters - experts * 3 // 4:,} parameters work on each token"
    )


def test_a_config_of_merge_finetune_is_predicted_as_it_trains(tmp_path: Path) -> None:
    from finetune.config import load_config
    from merge.cli.memory import request_of

    text = "model: m\ndata: d\nout: o\ntrain: qlora\nrank: 4\nbatch_size: 2\nmax_length: 64\n"
    (tmp_path / "c.yaml").write_text(text + "optimizer: adamw_8bit\ntarget_modules: [q_proj]\n")
    assert request_of(load_config(str(tmp_path / "c.yaml"))) == Request(
        task="qlora", context=64, batch=2, optimizer="adam8bit", rank=4, targets=("q_proj",)
    )
    (tmp_path / "c.yaml").write_text(text.replace("qlora\nrank: 4", "bitfit"))
    with pytest.raises(UsageError, match="train: bitfit is not predicted"):
        request_of(load_config(str(tmp_path / "c.yaml")))


def test_master_weights_are_16_bytes_a_parameter() -> None:
    """ZeRO (arXiv:1910.02054), section 3.1: 2 + 2 + 12."""
    assert estimate("1B", Request(task="full", master_weights=True)).total == 16_000_000_000


def test_lora_of_rank_2_on_all_attention_matrices_of_gpt3_is_the_papers_18_874_368() -> None:
    """LoRA (arXiv:2106.09685), table 5: rank 8 on one of the four, 4 on two, 2 on all."""
    gpt3 = {f"h.{i}.attn.{name}.weight": (12288, 12288) for i in range(96) for name in ATTENTION}
    for rank, targets in ((8, ATTENTION[:1]), (4, ATTENTION[:2]), (2, ATTENTION)):
        assert count(lora_shapes(gpt3, rank, targets)) == 18_874_368


def test_lora_on_llama_2_13b() -> None:
    """r (in + out) for each matrix: 3.28 M, 6.55 MB in 16 bits, is rank 4 on query and key, or rank 2 on all four."""
    on_two = count(lora_shapes(LLAMA_2_13B, 2, ("q_proj", "k_proj")))
    assert on_two == 40 * 2 * 2 * (5120 + 5120) == 1_638_400  # 3.28 MB in 16 bits, 6.55 MB in float32
    assert (
        count(lora_shapes(LLAMA_2_13B, 2, ATTENTION)) == count(lora_shapes(LLAMA_2_13B, 4, ATTENTION[:2])) == 3_276_800
    )


@pytest.mark.filterwarnings("ignore::FutureWarning")  # peft asks transformers by a name that will be removed
def test_lora_counts_what_peft_makes(tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model
    from transformers import AutoConfig, AutoModelForCausalLM

    write_json(tmp_path / "config.json", llama_config(2, 16, True, "float32"))
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(tmp_path))
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    for targets in (("all-linear",), ("q_proj", "down_proj")):
        chosen = "all-linear" if targets == ("all-linear",) else list(targets)
        adapted = get_peft_model(AutoModelForCausalLM.from_config(model.config), LoraConfig(r=3, target_modules=chosen))
        trained = sum(p.numel() for p in adapted.parameters() if p.requires_grad)
        assert count(lora_shapes(shapes, 3, targets)) == trained
        found = estimate(str(tmp_path), Request(task="lora", rank=3, targets=targets, context=8))
        assert found.trainable == trained


@pytest.mark.parametrize(
    ("extra", "numbers"),
    [
        ({}, 2 * 8 * 4 * 100),  # layers x (2 x 2 heads x 2) x tokens, multi-head: see below
        ({"num_key_value_heads": 1}, 2 * 4 * 4 * 100),
        ({"sliding_window": 30}, 2 * 8 * 4 * 30),
        ({"sliding_window": 30, "use_sliding_window": False}, 2 * 8 * 4 * 100),
        ({"sliding_window": 30, "layer_types": ["sliding_attention", "full_attention"]}, 8 * 4 * 130),
        ({"layer_types": ["linear_attention", "full_attention"]}, 8 * 4 * 100),
        ({"kv_lora_rank": 5, "qk_rope_head_dim": 2}, 2 * 7 * 4 * 100),
        ({"head_dim": 3}, 2 * 12 * 4 * 100),
    ],
)
def test_key_value_cache(extra: dict[str, Any], numbers: int) -> None:
    config = {"num_hidden_layers": 2, "num_attention_heads": 2, "hidden_size": 4} | extra
    assert kv_cache_bytes(config, batch=4, context=100, itemsize=2) == 2 * numbers


def test_the_cache_is_the_one_transformers_fills(tmp_path: Path) -> None:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    write_json(tmp_path / "config.json", llama_config(2, 16, True, "float32"))
    config = AutoConfig.from_pretrained(tmp_path)
    with torch.no_grad():
        cache = AutoModelForCausalLM.from_config(config)(torch.zeros(3, 10, dtype=torch.long)).past_key_values
    real = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    assert kv_cache_bytes(config.to_dict(), batch=3, context=10, itemsize=4) == real
    assert parts(str(tmp_path), context=10, batch=3)["key-value cache"] == real


def test_activations_are_those_that_autograd_keeps(tmp_path: Path) -> None:
    """The count of one step on fake tensors against the same step on real ones, to the byte."""
    import weakref

    import torch
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils._pytree import tree_map_only
    from transformers import AutoConfig, AutoModelForCausalLM

    from merge.tools.memory_trace import trace_training

    class Live(TorchDispatchMode):
        sizes: dict[int, int] = {}  # noqa: RUF012
        peak = 0

        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            return tree_map_only(torch.Tensor, self.see, function(*args, **(kwargs or {})))

        def see(self, tensor: torch.Tensor) -> torch.Tensor:
            storage = tensor.untyped_storage()
            if storage._cdata not in self.sizes:
                self.sizes[storage._cdata] = storage.nbytes()
                weakref.finalize(storage, self.sizes.pop, storage._cdata)
                self.peak = max(self.peak, sum(self.sizes.values()))
            return tensor

    write_json(tmp_path / "config.json", llama_config(3, 16, True, "float32"))
    config = AutoConfig.from_pretrained(tmp_path)
    with Live() as live:
        model = AutoModelForCausalLM.from_config(config).train()
        tokens = torch.zeros(2, 12, dtype=torch.long)
        live.peak = 0
        output = model(input_ids=tokens, labels=tokens)
        output.loss.backward()
    trace = trace_training(config, dtype="float32", batch=2, context=12)
    assert trace.peak == live.peak
    less = trace_training(config, dtype="float32", batch=2, context=12, checkpointing=True)
    assert less.peak < trace.peak


def test_accumulated_gradients_stay_beside_activations(tmp_path: Path) -> None:
    write_json(tmp_path / "config.json", llama_config(4, 64, True, "float32"))
    model = str(tmp_path)
    once, added = (
        estimate(model, Request(task="full", device="cpu", batch=8, context=64, accumulation=more))
        for more in (False, True)
    )
    assert added.total - once.total == dict(once.parts)["gradients"]


def test_activations_grow_with_batch_and_shrink_with_checkpointing(tmp_path: Path) -> None:
    write_json(tmp_path / "config.json", llama_config(4, 64, True, "float32"))
    model = str(tmp_path)
    one, two = (estimate(model, Request(task="lora", batch=n, context=64)).total for n in (1, 8))
    kept = estimate(model, Request(task="lora", batch=8, context=64, checkpointing=True)).total
    assert one < kept < two


def test_weights_by_dtype() -> None:
    assert weight_bytes(unknown_shapes(1000), "nf4") == 500
    shapes = {"model.embed_tokens.weight": (10, 256), "layers.0.q_proj.weight": (4, 256), "norm.weight": (256,)}
    plain = 2 * (10 * 256 + 256)
    assert weight_bytes(shapes, "int8") == plain + 4 * 256 + 4 * 4
    assert weight_bytes(shapes, "nf4") == plain + 4 * 128 + 16 * 4
    assert weight_bytes(shapes, "nf4", double_quant=True) == plain + 4 * 128 + 16 + 4
    assert weight_bytes(shapes, "int4") == plain + 4 * 128 + 4 * 2 * 2


def test_optimizer_states() -> None:
    shapes = {"a": (64, 128), "b": (100,)}
    sizes = {name: optimizer_bytes(name, shapes, 2) for name in ("adamw", "sgd", "lion", "adam8bit", "adafactor")}
    assert sizes["adamw"] == 2 * sizes["lion"] == 4 * (64 * 128 + 100)
    assert sizes["sgd"] == 0
    assert sizes["adam8bit"] == 2 * (8192 + 4 * 32) + 8 * 100
    assert sizes["adafactor"] == 4 * (64 + 128 + 100)


def test_a_card_holds_what_its_driver_reports_less_the_context() -> None:
    """An L4 of "24 GB" reports 23,028 MiB."""
    usable = (23028 - 500) * 2**20
    assert [fit for size, *_, fit in fits(usable) if size == 24] == [True]
    assert [fit for size, *_, fit in fits(usable + 1) if size == 24] == [False]
    assert all(gib < size * 1e9 / 2**30 * 1.08 for size, gib, *_ in fits(0))


@pytest.mark.parametrize(
    ("text", "number"), [("13B", 13 * 10**9), ("7e9", 7 * 10**9), ("1.5b", 15 * 10**8), ("x7B", None)]
)
def test_numbers_of_parameters(text: str, number: int | None) -> None:
    assert parse_count(text) == number


def test_a_checkpoint_is_read_by_its_headers_and_a_config_by_its_classes(tmp_path: Path) -> None:
    sizes = {"layers": 2, "hidden": 16, "intermediate": 32, "vocabulary": 32, "heads": 2, "kv_heads": 1}
    stored = write_headers(tmp_path / "model", llama_shapes(**sizes), llama_config(2, 16, False, "float32"))
    by_headers = estimate(str(stored), Request(context=8))
    by_config = estimate(str(stored / "config.json"), Request(context=8))
    assert by_headers.parameters == by_config.parameters == count(llama_shapes(**sizes))
    assert by_headers.dtype == "float32"
    merge = estimate(str(stored), Request(task="merge"))
    assert 100 << 20 < merge.total < 1 << 30


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["13B", "--task", "lora"], "Name a config.json"),
        (["13B", "--batch", "2"], "only a number"),
        (["0B"], "above 0"),
        (["7B", "--task", "full", "--dtype", "nf4"], "cannot be trained"),
        (["7B", "--task", "full", "--optimizer", "adafactor"], "Name a config.json"),
        (["no-such-model"], "no such directory"),
    ],
)
def test_what_cannot_be_said_is_one_clear_error(args: list[str], message: str) -> None:
    from click.testing import CliRunner

    from merge.cli.memory import command
    from merge.errors import MergeError

    result = CliRunner().invoke(command, args)
    assert isinstance(result.exception, MergeError)
    assert message in str(result.exception)


def test_an_unknown_target_lists_those_there_are(tmp_path: Path) -> None:
    write_json(tmp_path / "config.json", llama_config(2, 16, True, "float32"))
    with pytest.raises(UsageError, match=r'no linear layer is named "query".*q_proj'):
        estimate(str(tmp_path), Request(task="lora", targets=("query",)))


def test_the_command_prints_tables_and_json(call_cli: Callable[..., Output]) -> None:
    shown = call_cli(["memory", "13B"])
    assert (shown.code, shown.stderr) == (0, "")
    assert "31.200" in shown.stdout
    assert json.loads(call_cli(["memory", "7B", "--task", "full", "--json"]).stdout)["total"] == 112_000_000_000
