"""merge quantize: what transformers loads is what was meant, whole or resumed, and the errors are true."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import Output

from merge import build_plan, load_recipe, run_plan, verify_output
from merge.errors import CheckpointError, NumbersError, UsageError
from merge.recipe.references import parse_reference
from merge.tools.convert import convert_plan
from merge.tools.quantize import quantize
from merge.tools.quantizers import Int4, Nf4, make_quantizer

LAYER = "model.layers.1.mlp.down_proj"
# What the libraries warn of when they load on a processor is not ours.
pytestmark = pytest.mark.filterwarnings("default")


@pytest.fixture
def model(tmp_path: Path, make_model: Callable[..., Path]) -> Path:
    return make_model(tmp_path / "model", hidden=64, dtype="BF16", tied=True)


def load(path: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(path, dtype="auto").eval()


def logits(network: Any) -> Any:
    import torch

    with torch.inference_mode():
        return network(input_ids=torch.arange(1, 13)[None]).logits.float()


@pytest.mark.parametrize(
    ("to", "package", "far"),
    [
        ("int8", "bitsandbytes", 0.05),
        ("nf4", "bitsandbytes", 0.3),
        ("fp8", "accelerate", 0.1),
        ("int4", "compressed_tensors", 0.3),
    ],
)
def test_transformers_loads_it_and_its_logits_are_near(
    model: Path, tmp_path: Path, to: str, package: str, far: float
) -> None:
    pytest.importorskip(package)
    done = quantize(parse_reference(str(model)), tmp_path / "out", to)
    assert verify_output(tmp_path / "out").problems == ()
    assert done.layers == 14
    assert done.bytes_after < done.bytes_before
    before, after = logits(load(model)), logits(load(tmp_path / "out"))
    distance = float((after - before).norm() / before.norm())
    assert 0 < distance < far
    assert set(done.errors) == {
        f"model.layers.{i}.{part}"
        for i in range(2)
        for part in (
            *(f"self_attn.{name}_proj" for name in "qkvo"),
            *(f"mlp.{name}_proj" for name in ("gate", "up", "down")),
        )
    }


def _high(packed: Any) -> Any:
    return packed.int() >> 4


def _low(packed: Any) -> Any:
    return packed.int() & 15


@pytest.mark.parametrize("to", ["int8", "nf4"])
def test_bytes_and_errors_are_bitsandbytes_own(model: Path, tmp_path: Path, to: str) -> None:
    bnb = pytest.importorskip("bitsandbytes")
    from safetensors.torch import load_file

    done = quantize(parse_reference(str(model)), tmp_path / "out", to)
    weight = load_file(model / "model.safetensors")[f"{LAYER}.weight"]
    ours = load_file(tmp_path / "out" / "model.safetensors")
    if to == "nf4":
        packed, state = bnb.functional.quantize_4bit(weight, blocksize=64, quant_type="nf4")
        assert ours[f"{LAYER}.weight.absmax"].equal(state.absmax)
        written = bnb.functional.dequantize_4bit(ours[f"{LAYER}.weight"], state).float()
        apart = [(code(ours[f"{LAYER}.weight"]) - code(packed)).abs() for code in (_high, _low)]
    else:
        packed, scales, _ = bnb.functional.int8_vectorwise_quant(weight.half())
        assert ours[f"{LAYER}.SCB"].equal(scales)
        written = ours[f"{LAYER}.weight"].float() * scales[:, None] / 127
        apart = [(ours[f"{LAYER}.weight"].int() - packed.int()).abs()]
    # bitsandbytes scales in 16 bits: next to a boundary a code may be its neighbour
    assert max(int(each.max()) for each in apart) <= 1
    assert all(float(each.float().mean()) < 0.1 for each in apart)
    error = float((written - weight.float()).norm() / weight.float().norm())
    assert done.errors[LAYER] == pytest.approx(error, rel=1e-3)
    assert ours["model.embed_tokens.weight"].equal(load_file(model / "model.safetensors")["model.embed_tokens.weight"])


@pytest.mark.parametrize("nested", [False, True])
def test_dequantized_is_what_bitsandbytes_computes_with(model: Path, tmp_path: Path, nested: bool) -> None:
    bnb = pytest.importorskip("bitsandbytes")
    import torch
    from safetensors.torch import load_file

    quantize(parse_reference(str(model)), tmp_path / "out", "nf4", dequantize=True, nested=nested)
    assert verify_output(tmp_path / "out").problems == ()
    assert json.loads((tmp_path / "out/config.json").read_text()) == json.loads((model / "config.json").read_text())
    before, after = (load_file(path / "model.safetensors") for path in (model, tmp_path / "out"))
    assert {name: value.dtype for name, value in after.items()} == {name: v.dtype for name, v in before.items()}
    assert torch.equal(after["model.norm.weight"], before["model.norm.weight"])
    stored, state = bnb.functional.quantize_4bit(
        before[f"{LAYER}.weight"], compress_statistics=nested, quant_type="nf4"
    )
    theirs = bnb.functional.dequantize_4bit(stored, state)
    differs = (after[f"{LAYER}.weight"] != theirs).float().mean()
    assert differs < 0.01  # next to a boundary a code may be its neighbour, as above
    assert not torch.equal(after[f"{LAYER}.weight"], before[f"{LAYER}.weight"])


@pytest.mark.parametrize("to", ["int8", "nf4", "int4", "fp8"])
def test_what_was_quantised_is_read_as_what_it_means(model: Path, tmp_path: Path, to: str) -> None:
    from safetensors.torch import load_file

    for name, dequantize in (("stored", False), ("meant", True)):
        quantize(parse_reference(str(model)), tmp_path / name, to, dequantize=dequantize)
    run_plan(convert_plan(str(tmp_path / "stored")), tmp_path / "read")
    assert "quantization_config" not in json.loads((tmp_path / "read/config.json").read_text())
    meant, read = (load_file(tmp_path / name / "model.safetensors") for name in ("meant", "read"))
    assert sorted(read) == sorted(meant)
    assert all(read[name].equal(meant[name]) for name in meant)


@pytest.mark.parametrize("to", ["int8", "nf4", "int4"])
def test_quantised_experts_are_merged_and_loaded(
    model: Path, make_model: Callable[..., Path], tmp_path: Path, to: str
) -> None:
    expert = make_model(tmp_path / "expert", hidden=64, dtype="BF16", tied=True, seed=7, base=model, delta=0.03)
    quantize(parse_reference(str(expert)), tmp_path / "small", to)
    (tmp_path / "r.yaml").write_text(
        "merge_method: task_arithmetic\nbase_model: model\nmodels: [{model: small, parameters: {weight: 1}}]\n"
        "dtype: bfloat16\n"
    )
    (entry,) = run_plan(build_plan(load_recipe(tmp_path / "r.yaml")), tmp_path / "out").quantised
    assert entry["model"] == "small"
    assert entry["rounding"] == pytest.approx({"int8": 0.006, "nf4": 0.094, "int4": 0.1}[to], rel=0.2)
    assert entry["task_vector"] > 0.5  # the expert is 0.6 of the base's size away
    assert verify_output(tmp_path / "out").problems == ()
    run_plan(convert_plan(str(tmp_path / "small")), tmp_path / "plain")
    distance = logits(load(tmp_path / "out")) - logits(load(tmp_path / "plain"))
    assert float(distance.norm()) < 0.02 * float(logits(load(tmp_path / "plain")).norm())


def test_a_merge_of_little_more_than_rounding_says_so(
    model: Path, tmp_path: Path, call_cli: Callable[..., Output]
) -> None:
    quantize(parse_reference(str(model)), tmp_path / "small", "nf4")
    (tmp_path / "r.yaml").write_text(
        "merge_method: task_arithmetic\nbase_model: model\nmodels: [{model: small, parameters: {weight: 1}}]\n"
    )
    said = call_cli(["run", "r.yaml", "-o", "out"])
    assert said.code == 0
    line = next(line for line in said.stdout.splitlines() if line.startswith("quantised: "))
    assert re.search(r"small: its task vector is 0.09\d* of the base; rounding alone makes about 0.094", line)
    assert line.endswith(": this merge adds noise")


def test_an_adapter_on_a_quantised_base(model: Path, tmp_path: Path) -> None:
    import torch
    from safetensors.torch import load_file, save_file

    quantize(parse_reference(str(model)), tmp_path / "small", "nf4")
    run_plan(convert_plan(str(tmp_path / "small"), "float32"), tmp_path / "plain")
    (tmp_path / "lora").mkdir()
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(shape, generator=generator) * 0.02 for shape in ((2, 64), (64, 2)))
    names = [f"base_model.model.model.layers.1.self_attn.q_proj.lora_{part}.weight" for part in "AB"]
    save_file(dict(zip(names, (a, b), strict=True)), str(tmp_path / "lora/adapter_model.safetensors"))
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj"], "task_type": "CAUSAL_LM"}
    (tmp_path / "lora/adapter_config.json").write_text(json.dumps(config))
    (tmp_path / "r.yaml").write_text(
        "merge_method: task_arithmetic\nbase_model: small\nmodels: [{model: small+lora, parameters: {weight: 1}}]\n"
        "dtype: float32\n"
    )
    report = run_plan(build_plan(load_recipe(tmp_path / "r.yaml")), tmp_path / "out")
    assert report.quantised == ()  # the same rounding on both sides: the task vector is the adapter's own
    merged, plain = (load_file(tmp_path / name / "model.safetensors") for name in ("out", "plain"))
    expected = plain["model.layers.1.self_attn.q_proj.weight"] + 2 * b @ a
    assert torch.allclose(merged["model.layers.1.self_attn.q_proj.weight"], expected, atol=1e-6)


def test_pieces_of_rows_give_what_the_whole_matrix_gives() -> None:
    values = np.random.default_rng(0).standard_normal((256, 96)).astype(np.float32)
    for to in ("int8", "nf4", "int4", "fp8"):
        quantizer = make_quantizer(to, {"m": (256, 96)})
        whole, meant = quantizer.encode(values)
        halves = [quantizer.encode(values[start : start + 128]) for start in (0, 128)]
        assert np.array_equal(meant, np.concatenate([half for _, half in halves]))
        for suffix, data in whole.items():
            assert np.array_equal(data, np.concatenate([parts[suffix] for parts, _ in halves])), (to, suffix)
        shapes = {part.suffix: part.shape for part in quantizer.parts((256, 96), "bfloat16")}
        assert all(data.size == np.prod(shapes[suffix]) for suffix, data in whole.items())


def test_zeros_and_an_odd_number_of_weights() -> None:
    parts, meant = Nf4().encode(np.array([[0.0, 0.5, -1.0]], np.float32))
    assert parts["weight"].tolist() == [0x7C, 0x07]  # 0 is code 7, 0.44 is 12, -1 is 0; the eighth half byte pads
    assert meant[0, [0, 2]].tolist() == [0.0, -1.0]
    for to in ("int8", "nf4", "int4", "fp8"):
        assert not make_quantizer(to, {"m": (128, 128)}).encode(np.zeros((128, 128), np.float32))[1].any()


def test_int4_packs_eight_numbers_from_the_lowest_bits_on() -> None:
    values = np.zeros((1, 32), np.float32)
    values[0, :3] = [7.5, -7.5, 1.0]
    parts, _ = Int4(32).encode(values)
    # 7.5 is cut to 7, so 15; -7.5 rounds to -8, so 0; 1 is 9; zeros are 8
    assert parts["weight_packed"].view(np.uint32).tolist() == [0x8888890F, *[0x88888888] * 3]


def test_include_and_exclude(model: Path, tmp_path: Path) -> None:
    done = quantize(parse_reference(str(model)), tmp_path / "out", "nf4", include=["*.mlp.*"], exclude=["*.1.*"])
    assert set(done.errors) == {f"model.layers.0.mlp.{name}_proj" for name in ("gate", "up", "down")}
    skipped = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]["llm_int8_skip_modules"]
    assert {"lm_head", "model.layers.1.mlp.up_proj", "model.layers.0.self_attn.q_proj"} <= set(skipped)
    pytest.importorskip("bitsandbytes")
    assert logits(load(tmp_path / "out")).isfinite().all()


def test_shards_threads_and_interruptions_give_the_same_bytes(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ref = parse_reference(str(model))

    def files(out: Path) -> dict[str, bytes]:
        return {path.name: path.read_bytes() for path in sorted(out.iterdir())}

    quantize(ref, tmp_path / "a" / "out", "nf4", threads=1, shard_bytes=20_000)
    expected = files(tmp_path / "a" / "out")
    assert sum(name.endswith(".safetensors") for name in expected) > 1
    calls = 0
    encode = Nf4.encode

    def stop(self: Nf4, values: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 6:
            raise KeyboardInterrupt
        return encode(self, values)

    monkeypatch.setattr(Nf4, "encode", stop)
    with pytest.raises(KeyboardInterrupt):
        quantize(ref, tmp_path / "b" / "out", "nf4", threads=1, shard_bytes=20_000)
    assert not (tmp_path / "b" / "out").exists()
    before = calls
    quantize(ref, tmp_path / "b" / "out", "nf4", threads=3, shard_bytes=20_000)
    assert calls - before == 14 - (before - 1)  # one failed: those that were done are not done again
    assert files(tmp_path / "b" / "out") == expected


def test_what_cannot_be_quantised_is_one_clear_error(
    model: Path, tmp_path: Path, make_model: Callable[..., Path]
) -> None:
    ref = parse_reference(str(model))
    with pytest.raises(UsageError, match="no linear layer to quantise"):
        quantize(ref, tmp_path / "x", "nf4", include=["nothing"])
    small = make_model(tmp_path / "small", hidden=16)
    with pytest.raises(UsageError, match=r"128, 64 or 32 numbers.*--exclude"):
        quantize(parse_reference(str(small)), tmp_path / "x", "int4")
    weight = np.full((64, 128), np.nan, np.float32)
    broken = make_model(tmp_path / "broken", hidden=64, extra={f"{LAYER}.weight": weight})
    place = (
        rf"{re.escape(str(broken))}/model\.safetensors: {re.escape(LAYER)}\.weight: NaN .* --exclude {re.escape(LAYER)}"
    )
    with pytest.raises(NumbersError, match=place):
        quantize(parse_reference(str(broken)), tmp_path / "x", "nf4")
    assert not (tmp_path / "x").exists()
    quantize(ref, tmp_path / "out", "nf4")
    with pytest.raises((UsageError, CheckpointError), match="quantised"):
        quantize(parse_reference(str(tmp_path / "out")), tmp_path / "twice", "int8")


def test_the_command_says_errors_and_perplexity(model: Path, tmp_path: Path, call_cli: Callable[..., Output]) -> None:
    shown = call_cli(["quantize", model, "-o", tmp_path / "out", "--to", "nf4", "--no-perplexity"])
    assert (shown.code, shown.stderr) == (0, "")
    assert "14 linear layers in nf4" in shown.stdout
    assert "down_proj" in shown.stdout


def test_perplexity_of_a_model_that_knows_nothing_is_its_vocabulary(model: Path, tmp_path: Path) -> None:
    from merge.tools.short_perplexity import perplexity

    data = tmp_path / "text.txt"
    data.write_text("w1 w2 w3 w4 w5 w6\nw7 w8 w9\n")
    assert perplexity(str(model), data) == pytest.approx(32, rel=0.5)
