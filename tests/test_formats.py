"""merge formats: values against hand-worked ones and torch's casts; a checkpoint's losses, whatever the threads."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import Output

from merge.checkpoint import open_checkpoint
from merge.recipe.references import parse_reference
from merge.tools.format_survey import FORMATS, nf4_rounded, survey, tensor_class
from merge.tools.formats import FLOATS, NF4, in_all_formats, in_float, in_int8, in_nf4, round_to

BY_NAME = {form.name: form for form in FLOATS}
TORCH = {
    "FP32": torch.float32,
    "BF16": torch.bfloat16,
    "FP16": torch.float16,
    "FP8 E4M3": torch.float8_e4m3fn,
    "FP8 E5M2": torch.float8_e5m2,
}


def stored(value: float) -> dict[str, float]:
    return {each.format: each.stored for each in in_all_formats(value, 1.0)}


def test_the_figures_of_the_textbooks() -> None:
    assert (stored(1234.56789)["FP16"], stored(1234.56789)["BF16"]) == (1235.0, 1232.0)
    assert (stored(123456.789)["FP16"], stored(123456.789)["BF16"]) == (math.inf, 123392.0)


@pytest.mark.parametrize("name", TORCH)
def test_rounding_is_torchs(name: str) -> None:
    random = np.random.default_rng(0)
    values = np.concatenate(
        [
            random.standard_normal(200) * 10.0 ** random.uniform(-9, 5.5, 200),
            [0.0, -0.0, 2.0**-9, 3 * 2.0**-10, 2.0**-17, 65504, 65519.99, 65520, 448, 463.9, 57344, 61440, 6e-8],
        ]
    ).astype(np.float32)
    expected = torch.from_numpy(values).to(TORCH[name]).double().tolist()
    for value, want in zip(values.tolist(), expected, strict=True):
        found = round_to(value, BY_NAME[name])
        if name == "FP8 E4M3" and abs(value) > 464:  # torch stores 448; the format's own overflow is NaN
            assert math.isnan(found)
        elif not math.isfinite(want):
            assert not math.isfinite(found)
        else:
            assert found == want, value


@pytest.mark.parametrize(
    ("value", "name", "bits"),
    [
        (1.0, "FP32", ("0", "01111111", "0" * 23)),
        (-2.0, "FP16", ("1", "10000", "0" * 10)),
        (2.0**-24, "FP16", ("0", "00000", "0000000001")),
        (math.inf, "BF16", ("0", "11111111", "0000000")),
        (448.0, "FP8 E4M3", ("0", "1111", "110")),
        (1e9, "FP8 E4M3", ("0", "1111", "111")),
        (0.15625, "FP8 E5M2", ("0", "01100", "01")),
        (1 / 3, "TF32", ("0", "01111101", "0101010101")),
    ],
)
def test_bits(value: float, name: str, bits: tuple[str, ...]) -> None:
    assert in_float(value, BY_NAME[name]).bits == bits


def test_integer_formats_share_the_scale_of_absmax() -> None:
    assert in_int8(-0.5, 1.0).stored == -64 / 127  # 63.5 rounds to even
    assert in_int8(3.0, 1.0).stored == 1.0
    assert in_int8(-1.0, 1.0).bits == ("10000001",)
    assert in_nf4(0.3, 2.0).stored == NF4[9] * 2.0
    assert in_nf4(0.3, 2.0).bits == ("1001",)


def test_nf4_is_bitsandbytes() -> None:
    bnb = pytest.importorskip("bitsandbytes")
    values = np.random.default_rng(0).standard_normal(64 * 50).astype(np.float32)
    packed, state = bnb.functional.quantize_4bit(torch.from_numpy(values), blocksize=64, quant_type="nf4")
    assert np.array_equal(nf4_rounded(values), bnb.functional.dequantize_4bit(packed, state).flatten().numpy())


def test_a_checkpoint_is_counted_by_hand(tmp_path: Path, make_model: Callable[..., Path]) -> None:
    extra = np.array([[1e6, 1e-9, 1.0, np.nan], [2.0, 0.1, 0.0, 500.0]], np.float32)
    model = make_model(tmp_path / "m", extra={"model.layers.0.mlp.odd.weight": extra})
    alone = {"model.layers.0.mlp.odd.weight"}
    checkpoint = open_checkpoint(parse_reference(str(model)))
    for name in set(checkpoint.tensors) - alone:
        del checkpoint.tensors[name]
    found = survey(checkpoint)
    assert list(found.losses) == ["mlp", "total"]
    assert found.nonfinite == 1
    half, fp8 = found.losses["mlp"]["FP16"], found.losses["mlp"]["FP8 E4M3"]
    assert (half.weights, half.overflow, half.underflow, half.changed) == (8, 1, 1, 3)  # 1e6; 1e-9; 0.1
    assert (fp8.overflow, fp8.underflow) == (2, 1)  # 1e6 and 500
    assert half.relative_rms == pytest.approx(
        math.sqrt((float(np.float16(0.1)) - float(np.float32(0.1))) ** 2 + 1e-18) / math.sqrt(1 + 4 + 0.01 + 250000)
    )


def test_a_survey_does_not_depend_on_threads(tmp_path: Path, make_model: Callable[..., Path]) -> None:
    checkpoint = open_checkpoint(parse_reference(str(make_model(tmp_path / "m", hidden=64, dtype="BF16"))))
    one, four = survey(checkpoint, threads=1), survey(checkpoint, threads=4)
    assert one == four
    total = one.losses["total"]
    assert set(total) == set(FORMATS)
    assert total["BF16"].changed == total["TF32"].changed == 0
    assert 0 < total["INT8"].relative_rms < total["FP8 E4M3 scaled"].relative_rms < total["NF4"].relative_rms < 0.2


def test_classes_of_tensors() -> None:
    names = {
        "model.embed_tokens.weight": "embedding",
        "lm_head.weight": "head",
        "model.layers.0.input_layernorm.weight": "norm",
        "model.layers.0.self_attn.q_proj.weight": "attention",
        "model.layers.3.block_sparse_moe.experts.1.w1.weight": "mlp",
        "rotary.inv_freq": "other",
    }
    assert {name: tensor_class(name) for name in names} == names


def test_the_command(tmp_path: Path, make_model: Callable[..., Path], call_cli: Callable[..., Output]) -> None:
    shown = call_cli(["formats", "-1234.56789", "inf"])
    assert (shown.code, shown.stderr) == (0, "")
    assert "1 11001 0011010011" in shown.stdout
    data = json.loads(call_cli(["formats", "--model", make_model(tmp_path / "m"), "--json"]).stdout)
    assert data["losses"]["total"]["BF16"]["weights"] == data["losses"]["total"]["NF4"]["weights"] > 0


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ([], "expected numbers, or --model"),
        (["1", "--model", "x"], "expected numbers, or --model"),
        (["one"], "is not a number"),
        (["1", "--absmax", "0"], "above 0"),
        (["--model", "./nowhere"], "no directory"),
    ],
)
def test_bad_arguments(args: list[str], message: str) -> None:
    from click.testing import CliRunner

    from merge.cli.formats import command
    from merge.errors import UsageError

    result = CliRunner().invoke(command, args)
    assert isinstance(result.exception, UsageError)
    assert message in str(result.exception)
