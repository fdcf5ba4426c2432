"""merge lora: an adapter made of two models gives the second one back, and PEFT loads it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from adapter_files import fold, make_adapter, make_base, read
from click.testing import CliRunner
from safetensors.numpy import load_file, save_file

from merge import verify_output
from merge.adapters.files import open_adapter
from merge.cli import cli
from merge.errors import CheckpointError, MergeError, NumbersError, UsageError
from merge.recipe.model import ModelRef
from merge.tools.extract import Summary, extract_adapter
from merge.tools.extract.select import Choice

pytestmark = pytest.mark.filterwarnings("ignore")  # what transformers and peft warn of is not ours
ROUNDING = 1e-7  # of an error that is the root of a difference of sums
SIZES = {"hidden_size": 96, "intermediate_size": 160}  # wide enough for the randomised way


def extract(tuned: Path, base: Path, out: Path, choice: Choice | None = None, **options: Any) -> Summary:
    refs = [ModelRef(str(path), str(path)) for path in (tuned, base)]
    return extract_adapter(refs[0], refs[1], out, choice=choice, **options)


def peft_merged(base: Path, adapter: Path) -> dict[str, np.ndarray]:
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    merged = PeftModel.from_pretrained(model, adapter).merge_and_unload()
    return {name: values.detach().numpy().copy() for name, values in merged.state_dict().items()}


def distance(found: np.ndarray, expected: np.ndarray, base: np.ndarray) -> float:
    """‖found - expected‖ / ‖expected - base‖"""
    change = np.linalg.norm(expected.astype(np.float64) - base)
    return float(np.linalg.norm(found.astype(np.float64) - expected) / change)


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """base, and tuned: base with a LoRA of rank 4 folded in, other norms and another lm_head."""
    root = tmp_path_factory.mktemp("family")
    base = make_base(root / "base", **SIZES)
    make_adapter(root / "lora", base, rank_pattern={"v_proj": 7})
    fold(base, root / "lora", root / "folded")
    tensors = load_file(root / "folded" / "model.safetensors")
    random = np.random.default_rng(3)
    for name in ("model.norm.weight", "lm_head.weight", "model.embed_tokens.weight"):
        tensors[name] = tensors[name] + 0.01 * random.standard_normal(tensors[name].shape, np.float32)
    (root / "tuned").mkdir()
    save_file(tensors, root / "tuned" / "model.safetensors")
    (root / "tuned" / "config.json").write_bytes((root / "folded" / "config.json").read_bytes())
    return root


@pytest.mark.parametrize("method", ["randomized", "exact"])
def test_a_folded_adapter_is_recovered(family: Path, tmp_path: Path, method: str) -> None:
    summary = extract(family / "folded", family / "base", tmp_path / "a", Choice(rank=8), method=method)
    assert summary.error < 1e-5
    assert summary.total_error == summary.error
    assert summary.others == ()
    assert verify_output(tmp_path / "a").problems == ()
    base, expected = read(family / "base"), read(family / "folded")
    for found in (
        fold(family / "base", tmp_path / "a", tmp_path / "out"),
        peft_merged(family / "base", tmp_path / "a"),
    ):
        for name in expected:
            if name.endswith("_proj.weight"):
                assert distance(found[name], expected[name], base[name]) < 1e-5, name
            else:
                assert np.array_equal(found[name], expected[name]), name


def test_the_energy_sets_the_ranks_and_the_error_is_the_one_stated(family: Path, tmp_path: Path) -> None:
    summary = extract(family / "folded", family / "base", tmp_path / "a", Choice(rank=None, energy=0.9))
    found = fold(family / "base", tmp_path / "a", tmp_path / "out")
    base, expected = read(family / "base"), read(family / "folded")
    assert len({row["rank"] for row in summary.modules}) > 1
    for row in summary.modules:
        name = f"{row['module']}.weight"
        singular = np.linalg.svd(expected[name].astype(np.float64) - base[name], compute_uv=False)
        energy = np.cumsum(singular**2) / np.sum(singular**2)
        assert row["rank"] == int(np.argmax(energy >= 0.9)) + 1
        best = np.sqrt(max(0.0, 1 - energy[row["rank"] - 1]))
        assert row["error"] == pytest.approx(best, rel=1e-4, abs=ROUNDING)
        assert distance(found[name], expected[name], base[name]) == pytest.approx(row["error"], rel=1e-3, abs=1e-6)
    peft = peft_merged(family / "base", tmp_path / "a")
    assert all(np.allclose(found[name], peft[name], rtol=1e-6, atol=1e-6) for name in found)


def test_randomised_factors_of_a_full_rank_difference_are_nearly_the_best(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base", **SIZES)
    random = np.random.default_rng(0)
    tensors = load_file(base / "model.safetensors")
    for name, values in tensors.items():
        if name.endswith("_proj.weight"):
            decay = 0.01 * np.diag(np.arange(1, min(values.shape) + 1) ** -0.5)
            left, right = (np.linalg.qr(random.standard_normal((n, min(values.shape))))[0] for n in values.shape)
            tensors[name] = (values + left @ decay @ right.T).astype(np.float32)
    (tmp_path / "tuned").mkdir()
    save_file(tensors, tmp_path / "tuned" / "model.safetensors")
    (tmp_path / "tuned" / "config.json").write_bytes((base / "config.json").read_bytes())
    fast, best = (
        extract(tmp_path / "tuned", base, tmp_path / method, Choice(rank=6), method=method)
        for method in ("randomized", "exact")
    )
    for one, other in zip(fast.modules, best.modules, strict=True):
        assert other["error"] <= one["error"] * (1 + 1e-9)
        assert one["error"] < 1.01 * other["error"]


def test_what_has_no_factors_is_reported_or_kept_whole(family: Path, tmp_path: Path) -> None:
    plain = extract(family / "tuned", family / "base", tmp_path / "plain", Choice(rank=8))
    lost = {row["tensor"]: row for row in plain.others}
    assert set(lost) == {"model.norm.weight", "lm_head.weight", "model.embed_tokens.weight"}
    assert not any(row["saved"] for row in lost.values())
    shares = sum(row["share"] for row in (*plain.others, *plain.modules))
    assert shares == pytest.approx(1)
    assert plain.total_error == pytest.approx(sum(row["share"] for row in plain.others) ** 0.5, rel=1e-3)

    kept = extract(family / "tuned", family / "base", tmp_path / "kept", Choice(rank=8), save_modules=True)
    assert kept.total_error < 1e-5
    assert open_adapter(ModelRef("", str(tmp_path / "kept"))).saved.keys() == lost.keys()
    expected, base = read(family / "tuned"), read(family / "base")
    ours = fold(family / "base", tmp_path / "kept", tmp_path / "out")
    for found in (ours, peft_merged(family / "base", tmp_path / "kept")):
        for name in lost:
            assert np.array_equal(found[name], expected[name]), name
        for name in expected:
            assert (
                name in lost
                or np.array_equal(expected[name], base[name])
                or (distance(found[name], expected[name], base[name]) < 1e-5)
            ), name


def test_embeddings_get_factors_on_request(family: Path, tmp_path: Path) -> None:
    choice = Choice(rank=40, embeddings=True, include=["*embed_tokens", "lm_head"])
    summary = extract(family / "tuned", family / "base", tmp_path / "a", choice)
    assert {row["module"] for row in summary.modules} == {"model.embed_tokens", "lm_head"}
    base, expected = read(family / "base"), read(family / "tuned")
    ours = fold(family / "base", tmp_path / "a", tmp_path / "out")
    for found in (ours, peft_merged(family / "base", tmp_path / "a")):
        for name in ("model.embed_tokens.weight", "lm_head.weight"):
            assert distance(found[name], expected[name], base[name]) < 1e-5, name


def test_tied_embeddings_that_are_kept_whole_stay_tied(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base", tie_word_embeddings=True)
    tuned = make_base(tmp_path / "tuned", tie_word_embeddings=True)
    tensors = load_file(base / "model.safetensors")
    tensors["model.embed_tokens.weight"] = tensors["model.embed_tokens.weight"] * np.float32(1.1)
    tensors["model.layers.0.mlp.up_proj.weight"] = tensors["model.layers.0.mlp.up_proj.weight"] * np.float32(1.1)
    save_file(tensors, tuned / "model.safetensors", {"format": "pt"})
    extract(tuned, base, tmp_path / "a", Choice(rank=32), save_modules=True)
    found = fold(base, tmp_path / "a", tmp_path / "out")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["tie_word_embeddings"] is True
    peft = peft_merged(base, tmp_path / "a")
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        assert np.array_equal(peft[name], tensors["model.embed_tokens.weight"])
    assert "lm_head.weight" not in found
    assert np.array_equal(found["model.embed_tokens.weight"], tensors["model.embed_tokens.weight"])


def test_matrices_stored_by_input_and_biases(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base", "gpt2", n_embd=64)
    tuned = make_base(tmp_path / "tuned", "gpt2", n_embd=64)
    tensors = load_file(base / "model.safetensors")
    random = np.random.default_rng(0)
    for name, values in tensors.items():
        if ".h." in name:
            change = random.standard_normal((values.shape[0], 3)) @ random.standard_normal((3, values.shape[-1]))
            tensors[name] = (values + 0.01 * (change if values.ndim == 2 else change[0])).astype(np.float32)
    save_file(tensors, tuned / "model.safetensors", {"format": "pt"})
    summary = extract(tuned, base, tmp_path / "a", Choice(rank=5), save_modules=True)
    assert summary.total_error < 1e-5
    before = read(base)
    for found in (fold(base, tmp_path / "a", tmp_path / "out"), peft_merged(base, tmp_path / "a")):
        for name, values in tensors.items():
            if ".h." in name:
                assert distance(found[name], values, before[name]) < 1e-5, name


def test_patterns_choose_modules_and_ranks(family: Path, tmp_path: Path) -> None:
    choice = Choice(
        rank=2, rank_pattern={r"layers\.1\..*_proj": 4, "q_proj": 3}, include=["*self_attn*"], exclude=["*o_proj"]
    )
    summary = extract(family / "folded", family / "base", tmp_path / "a", choice)
    ranks = {row["module"].removeprefix("model.layers."): row["rank"] for row in summary.modules}
    expected = {"0.self_attn.q_proj": 3, "0.self_attn.k_proj": 2, "0.self_attn.v_proj": 2}
    assert ranks == expected | {f"1.self_attn.{name}_proj": 4 for name in "qkv"}
    opened = open_adapter(ModelRef("", str(tmp_path / "a")))
    assert {name: module.rank for name, module in opened.modules.items()} == {
        f"model.layers.{name}": rank for name, rank in ranks.items()
    }
    assert all(module.scaling == 1 for module in opened.modules.values())
    peft_merged(family / "base", tmp_path / "a")


def test_the_same_bytes_on_any_threads_and_after_a_stop(family: Path, tmp_path: Path) -> None:
    choice = Choice(rank=4)
    extract(family / "tuned", family / "base", tmp_path / "one" / "a", choice, threads=1)

    class Stop(Exception):
        pass

    def stop(done: int) -> None:
        raise Stop

    with pytest.raises(Stop):
        extract(family / "tuned", family / "base", tmp_path / "two" / "a", choice, threads=1, progress=stop)
    assert not (tmp_path / "two" / "a").exists()
    summary = extract(family / "tuned", family / "base", tmp_path / "two" / "a", choice, threads=2)
    assert summary.resumed >= 1
    assert not (tmp_path / "two" / "a.partial").exists()
    for name in ("adapter_model.safetensors", "adapter_config.json", "README.md", "merge_manifest.json"):
        assert (tmp_path / "one" / "a" / name).read_bytes() == (tmp_path / "two" / "a" / name).read_bytes(), name


def test_a_large_matrix_is_read_in_blocks(family: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from merge.tools.extract import difference

    expected = extract(family / "folded", family / "base", tmp_path / "whole", Choice(rank=4))
    monkeypatch.setattr(difference, "_BLOCK", 1000)
    monkeypatch.setattr(difference, "KEPT", 0)
    found = extract(family / "folded", family / "base", tmp_path / "blocks", Choice(rank=4))
    errors = [[row["error"] for row in summary.modules] for summary in (found, expected)]
    assert errors[0] == pytest.approx(errors[1], rel=1e-6, abs=ROUNDING)
    assert max(errors[0]) > 0.1  # of the modules whose rank is cut


def test_bad_pairs_are_refused(family: Path, tmp_path: Path) -> None:
    base = family / "base"
    with pytest.raises(UsageError, match="is its own base"):
        extract(base, base, tmp_path / "a")
    larger = make_base(tmp_path / "larger", **SIZES, vocab_size=44)
    with pytest.raises(CheckpointError, match=r"lm_head.weight \(\[40, 96\] in the base, \[44, 96\]"):
        extract(larger, base, tmp_path / "a")
    deeper = make_base(tmp_path / "deeper", **SIZES | {"num_hidden_layers": 3})
    with pytest.raises(CheckpointError, match=r"layers\.2\.\S+ \(only in "):
        extract(deeper, base, tmp_path / "a")
    with pytest.raises(UsageError, match="no matrix is left"):
        extract(family / "tuned", base, tmp_path / "a", Choice(include=["*.nothing"]))
    same = make_base(tmp_path / "same", **SIZES)
    with pytest.raises(UsageError, match="nothing to extract"):
        extract(same, base, tmp_path / "a")
    broken = make_base(tmp_path / "broken", **SIZES)
    tensors = load_file(broken / "model.safetensors")
    tensors["model.layers.0.mlp.up_proj.weight"][3, 3] = np.nan
    save_file(tensors, broken / "model.safetensors")
    with pytest.raises(NumbersError, match=r"up_proj\.weight: NaN, infinity"):
        extract(broken, base, tmp_path / "a")
    assert not (tmp_path / "a").exists()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").touch()
    with pytest.raises(UsageError, match="full exists; nothing was changed"):
        extract(family / "tuned", base, tmp_path / "full")
    with pytest.raises(UsageError, match="which this run reads; nothing was changed"):
        extract(family / "tuned", base, base, force=True)


def test_the_command_line(
    family: Path, tmp_path: Path, call_cli: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    done = call_cli(["lora", "extract", family / "tuned", "--base", family / "base", "-o", "a", "--rank", "8"])
    assert done.code == 0, done.stderr
    assert "model.layers.0.self_attn.q_proj" in done.stdout
    assert "left out" in done.stdout
    assert "relative error" in done.stdout
    monkeypatch.chdir(tmp_path)
    rows = {row["name"]: row for row in json.loads(call("lora", "show", "a", "--json"))["tensors"]}
    base, tuned = read(family / "base"), read(family / "folded")
    name = "model.layers.1.mlp.up_proj"
    change = np.linalg.norm(tuned[f"{name}.weight"] - base[f"{name}.weight"])
    assert rows[name]["norm"] == pytest.approx(change, rel=1e-4)
    assert "Scaling" in call("lora", "show", "a")
    folded = call("lora", "fold", str(family / "base"), "a", "-o", "out", "--json", "--quiet")
    assert json.loads(folded)["tensors"] == len(base)
    for directory in ("out", "a"):
        call("verify", directory)
    wrong = call_cli(["lora", "extract", "a", "--base", "b", "-o", "c", "--rank-pattern", "q"])
    assert wrong.code == 2
    assert '--rank-pattern "q": expected RE=RANK' in wrong.stderr


def call(*arguments: str) -> str:
    """The same command in this process: torch is loaded already."""
    result = CliRunner().invoke(cli, arguments, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.stdout


def test_an_error_is_one_of_this_package(tmp_path: Path) -> None:
    with pytest.raises(MergeError):
        extract(tmp_path / "no", tmp_path / "none", tmp_path / "a")
