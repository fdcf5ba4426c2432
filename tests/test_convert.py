"""merge convert: the same numbers in another dtype, what that cost, and nothing lost on the way."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from bad_inputs.room import call
from conftest import encode
from quantized import gptq, make
from safetensors.numpy import load_file
from safetensors.torch import load_file as load_torch

import merge.output.writer
from merge import run_plan, verify_output
from merge.errors import MergeError, NumbersError, UsageError
from merge.output.manifest import read_manifest
from merge.output.rounding import rounding_of
from merge.tools.convert import convert_plan

EXTRA = {"ids": np.arange(7), "mask": np.array([True, False]), "scalar": np.float32(0.1).reshape(())}


@pytest.mark.parametrize(("stored", "dtype"), [("F32", "bf16"), ("F32", "fp16"), ("BF16", "fp32"), ("F64", "bfloat16")])
def test_numbers_are_rounded_once_and_the_loss_is_counted(
    tmp_path: Path, make_model: Callable[..., Path], stored: str, dtype: str
) -> None:
    tiny = np.array([1e-9, -1e-9, 0, 3e-8, 1.0], np.float32)
    model = make_model(tmp_path / "m", dtype=stored, extra=EXTRA | {"tiny": tiny})
    run_plan(convert_plan(str(model), dtype), tmp_path / "out")
    target = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32, "bfloat16": torch.bfloat16}[dtype]
    before, after = load_torch(model / "model.safetensors"), load_torch(tmp_path / "out" / "model.safetensors")
    assert sorted(before) == sorted(after)
    changed = underflow = 0
    lost = squares = largest = 0.0
    for name, x in before.items():
        if not x.is_floating_point():
            assert torch.equal(after[name], x)
            continue
        assert after[name].dtype == target
        assert torch.equal(after[name], x.to(target))
        wide, y = x.double(), after[name].double()
        change = (y - wide).abs()
        changed += int((change > 0).sum())
        underflow += int(((wide != 0) & (y == 0)).sum())
        kept = (wide != 0) & (y != 0)
        if x.dtype != target:
            lost, squares = lost + float(change.square().sum()), squares + float(wide.square().sum())
            largest = max(largest, float((change[kept] / wide[kept].abs()).max()))
    found = rounding_of(read_manifest(tmp_path / "out"))[-1]
    assert (found.kind, found.changed, found.underflow, found.overflow) == ("all", changed, underflow, 0)
    assert found.largest == pytest.approx(largest, rel=1e-12)
    assert found.rms == pytest.approx(math.sqrt(lost / squares), rel=1e-9)
    assert (underflow > 0) == (dtype == "fp16")
    assert (changed > 0) == (dtype != "fp32")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == str(target).removeprefix("torch.")
    assert (tmp_path / "out" / "tokenizer.json").read_bytes() == (model / "tokenizer.json").read_bytes()
    assert verify_output(tmp_path / "out").problems == ()


def test_without_a_dtype_bytes_are_copied_into_other_shards(tmp_path: Path, make_model: Callable[..., Path]) -> None:
    model = make_model(tmp_path / "m", dtype="BF16", shards=3, extra=EXTRA)
    run_plan(convert_plan(str(model), shard_bytes=4000), tmp_path / "out")
    shards = sorted((tmp_path / "out").glob("*.safetensors"))
    assert len(shards) > 3
    read = lambda folder: {n: t for file in folder.glob("*.safetensors") for n, t in load_torch(file).items()}  # noqa: E731
    before, after = read(model), read(tmp_path / "out")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) and before[name].dtype == after[name].dtype for name in before)
    assert rounding_of(read_manifest(tmp_path / "out")) == []


def test_a_torch_pickle_becomes_safetensors(tmp_path: Path, make_model: Callable[..., Path]) -> None:
    model = make_model(tmp_path / "m", tied=True)
    tensors = {name: torch.from_numpy(values) for name, values in load_file(model / "model.safetensors").items()}
    torch.save(tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"]}, model / "pytorch_model.bin")
    (model / "model.safetensors").unlink()
    run_plan(convert_plan(str(model)), tmp_path / "out")
    after = load_torch(tmp_path / "out" / "model.safetensors")
    assert after.keys() == tensors.keys()  # the head is tied, so it is not written again
    assert all(torch.equal(after[name], tensors[name]) for name in tensors)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["tie_word_embeddings"] is True


def test_there_and_back_is_the_same(tmp_path: Path, make_model: Callable[..., Path]) -> None:
    model = make_model(tmp_path / "m", dtype="BF16")
    run_plan(convert_plan(str(model), "fp32"), tmp_path / "wide")
    run_plan(convert_plan(str(tmp_path / "wide"), "bf16"), tmp_path / "back")
    before, after = load_torch(model / "model.safetensors"), load_torch(tmp_path / "back" / "model.safetensors")
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert rounding_of(read_manifest(tmp_path / "back"))[-1].changed == 0


def test_too_large_numbers_are_an_error_that_can_be_allowed(
    tmp_path: Path, make_model: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    huge = np.array([7e4, 1.0, -1e6, 65519.9], np.float32)
    make_model(tmp_path / "m", extra={"model.layers.0.mlp.bias": huge})
    with pytest.raises(NumbersError, match="2 values"):
        run_plan(convert_plan(str(tmp_path / "m"), "fp16"), tmp_path / "out")
    code, out, err = call(["convert", "m", "-o", "cli", "--dtype", "fp16"])
    assert (code, out) == (1, "")
    assert "model.layers.0.mlp.bias: 2 values (largest 1e+06) do not fit F16" in err
    assert "give --allow overflow" in err
    assert not (tmp_path / "cli").exists()
    code, out, err = call(["convert", "m", "-o", "allowed", "--dtype", "fp16", "--allow", "overflow", "--json"])
    assert code == 0, err
    (mlp,) = [entry for entry in json.loads(out)["rounding"] if entry["kind"] == "mlp"]
    assert mlp["overflow"] == 2
    assert np.isinf(load_file(tmp_path / "allowed" / "model.safetensors")["model.layers.0.mlp.bias"]).sum() == 2


def test_resumed_it_is_the_same_with_the_same_report(
    tmp_path: Path, make_model: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = convert_plan(str(make_model(tmp_path / "m")), "bf16")
    run_plan(plan, tmp_path / "whole", threads=3)
    finish, done = merge.output.writer.OutputDirectory.finish, []

    def failing(self: object, index: int, record: dict[str, object]) -> None:
        if len(done) == 6:
            raise MergeError("stop")
        done.append(index)
        finish(self, index, record)  # type: ignore[arg-type]

    with monkeypatch.context() as patch:
        patch.setattr(merge.output.writer.OutputDirectory, "finish", failing)
        with pytest.raises(MergeError, match="stop"):
            run_plan(plan, tmp_path / "cut", threads=1)
    assert run_plan(plan, tmp_path / "cut").resumed_tensors == 6
    for path in (tmp_path / "whole").iterdir():
        assert path.read_bytes() == (tmp_path / "cut" / path.name).read_bytes()


def test_command(tmp_path: Path, make_model: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    make_model(tmp_path / "m")
    code, out, err = call(["convert", "m", "-o", "out", "--dtype", "bf16"])
    assert (code, err) == (0, "")
    assert "largest relative change" in out
    assert [line.split()[0] for line in out.splitlines() if line.startswith(("embedding", "all"))] == [
        "embedding",
        "all",
    ]
    assert call(["verify", "out"])[0] == 0
    code, out, err = call(["convert", "m", "-o", "out", "--dtype", "bf16"])
    assert (code, "out exists; nothing was changed" in err) == (2, True)
    code, out, err = call(["convert", "m", "-o", "new", "--dtype", "bfloat"])
    assert (code, 'unknown dtype "bfloat"; did you mean "bfloat16"?' in err) == (2, True)
    code, out, err = call(["convert", "./nothing", "-o", "new"])
    assert (code, 'there is no directory "./nothing"' in err) == (2, True)
    assert not (tmp_path / "new").exists()


def test_integers_are_no_target(tmp_path: Path, make_model: Callable[..., Path]) -> None:
    with pytest.raises(UsageError, match='unknown dtype "int8"'):
        convert_plan(str(make_model(tmp_path / "m")), "int8")


def test_fp8_with_scales_becomes_plain_numbers(tmp_path: Path, make_model: Callable[..., Path]) -> None:
    model = make_model(tmp_path / "m", dtype="BF16")
    name = "model.layers.0.mlp.up_proj.weight"
    from safetensors.torch import save_file

    tensors = load_torch(model / "model.safetensors")
    codes = (tensors[name].float() * 8).to(torch.float8_e4m3fn)
    save_file(
        tensors | {name: codes, name + "_scale_inv": torch.tensor([[0.125]])},
        model / "model.safetensors",
        {"format": "pt"},
    )
    config = json.loads((model / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    (model / "config.json").write_text(json.dumps(config))
    run_plan(convert_plan(str(model), "fp32"), tmp_path / "out")
    after = load_torch(tmp_path / "out" / "model.safetensors")
    assert torch.equal(after[name], codes.float() * 0.125)
    assert "quantization_config" not in json.loads((tmp_path / "out" / "config.json").read_text())
    assert encode(np.ones(1, np.float32), "BF16")[0] == 0x3F80


def test_dequantize_wants_a_quantised_model(tmp_path: Path, make_model: Callable[..., Path]) -> None:
    plain = make_model(tmp_path / "plain", dtype="BF16")
    with pytest.raises(UsageError) as caught:
        convert_plan(str(plain), dequantize=True)
    assert "--dequantize: none of its weights is quantised" in str(caught.value)
    tensors, config = gptq(32, 64, 4, 32)[0], {"quant_method": "gptq", "bits": 4}
    make(tmp_path / "small", tensors, config)
    plan = convert_plan(str(tmp_path / "small"), dequantize=True)
    assert [step.dtype for step in plan.steps] == ["F16"]
    run_plan(plan, tmp_path / "out")
    assert "quantization_config" not in (tmp_path / "out/config.json").read_text()
