"""Mixtures of experts: the plan, the numbers of experts and routers, and resuming; the rest needs transformers."""

from __future__ import annotations

import base64
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mixtures
import numpy as np
import pytest
from headers import MISTRAL_7B, write_llama
from mixtures import EXPERT, GATE, TWO, made, planned
from safetensors.numpy import load_file

import merge.jobs.mixtures.gates
from merge import build_plan, parse_recipe, run_plan, verify_output
from merge.kernels.random import fill_normal, fill_uniform, normal_quantile, split_key
from merge.output.writer import OutputDirectory
from merge.plan import Derived
from merge.sources.reinitialised import chosen

root = mixtures.root  # fixture

NAMES = {"w1": "gate_proj", "w3": "up_proj", "w2": "down_proj"}


def test_eight_experts_of_mistral_7b(tmp_path: Path) -> None:
    write_llama(tmp_path / "m", MISTRAL_7B, shards=3)
    text = "base_model: {root}/m\ngate_mode: random\nexperts:\n" + "  - source_model: {root}/m\n" * 8
    plan = planned(tmp_path, text)
    assert plan.n_parameters == 46_702_792_704
    assert plan.experts is not None
    assert (plan.experts.n_experts, plan.experts.per_token, plan.experts.n_layers) == (8, 2, 32)
    assert plan.experts.active == 12_879_925_248
    copies = [step for step in plan.steps if step.method == "copy"]
    assert len(plan.steps) - len(copies) == 32  # the routers; all else is copied


def test_plan_says_what_the_mixture_is(root: Path, call_cli: Callable[..., Any]) -> None:
    (root / "r.yaml").write_text(TWO.format(root=root, mode="hidden"))
    done = call_cli(["plan", root / "r.yaml"])
    assert done.code == 0, done.stderr
    assert "mixture of experts, Mixtral" in done.stdout
    assert "experts  2 in each of 2 layers, 2 for each token: 8,848 active parameters; 4 prompts of 7 tokens" in (
        done.stdout
    )
    told = json.loads(call_cli(["plan", root / "r.yaml", "--json"]).stdout)
    assert told["active_parameters"] == told["parameters"] == 8848


def test_experts_are_the_models_mlps_byte_for_byte(root: Path) -> None:
    out = made(root, TWO)
    for number, model in enumerate("ab"):
        dense = load_file(root / model / "model.safetensors")
        for layer in range(2):
            for ours, theirs in NAMES.items():
                name = f"model.layers.{layer}.mlp.{theirs}.weight"
                assert np.array_equal(out[EXPERT.format(layer, number, ours)], dense[name])
    base = load_file(root / "a" / "model.safetensors")
    assert all(np.array_equal(out[name], values) for name, values in base.items() if ".mlp." not in name)
    assert len(out) == len(base) - 6 + 12 + 2


def test_attention_average_is_the_mean_of_the_experts_and_any_method_goes(root: Path, make_model: Any) -> None:
    make_model(root / "c", seed=3, base=root / "a", delta=0.01)
    text = TWO.replace("root}/a, positive", "root}/c, positive")
    a, b, c = (load_file(root / name / "model.safetensors") for name in "abc")
    name = "model.layers.1.self_attn.q_proj.weight"
    mean = made(root, text + "attention: average\n", out="mean")
    np.testing.assert_allclose(mean[name], (b[name] + c[name]) / 2, rtol=1e-6)
    np.testing.assert_allclose(mean["lm_head.weight"], (b["lm_head.weight"] + c["lm_head.weight"]) / 2, rtol=1e-6)
    assert np.array_equal(mean[EXPERT.format(1, 0, "w1")], c["model.layers.1.mlp.gate_proj.weight"])
    settings = "attention: {{merge_method: task_arithmetic, parameters: {{weight: 0.25}}}}\n"
    task = made(root, text + settings, out="task")
    expected = a[name] + 0.25 * (b[name] - a[name]) + 0.25 * (c[name] - a[name])
    np.testing.assert_allclose(task[name], expected, rtol=1e-5, atol=1e-7)


def test_residual_scale_is_in_the_last_matrix_only(root: Path) -> None:
    text = TWO.replace("source_model: {root}/b", "residual_scale: 0.25, source_model: {root}/b")
    out, plain = made(root, text), made(root, TWO, out="plain")
    changed = [name for name in out if not np.array_equal(out[name], plain[name])]
    assert changed == [EXPERT.format(layer, 1, "w2") for layer in range(2)]
    assert all(np.array_equal(out[name], plain[name] * np.float32(0.25)) for name in changed)


def test_noise_has_its_deviation_and_is_a_function_of_seed_tensor_and_expert(root: Path) -> None:
    text = TWO.replace("source_model: {root}/a", "noise_scale: 0.5, source_model: {root}/a")
    text = text.replace("source_model: {root}/b", "noise_scale: 0.5, source_model: {root}/a")
    out, plain = made(root, text), made(root, TWO.replace("root}/b", "root}/a"), out="plain")
    noise = {name: out[name] - plain[name] for name in out if ".experts." in name}
    values = np.concatenate([each.ravel() for each in noise.values()])
    assert abs(values.std() - 0.5) < 0.02
    assert abs(values.mean()) < 0.02
    # No two tensors share their noise.
    corners = [round(float(each.flat[0]), 5) for each in noise.values()]
    assert len(set(corners)) == len(corners) == 12
    again = made(root, text, out="again", threads=1, block_chunks=1)
    assert all(np.array_equal(out[name], again[name]) for name in out)
    other = made(root, text + "seed: 1\n", out="other")
    assert not np.array_equal(out[EXPERT.format(0, 0, "w1")], other[EXPERT.format(0, 0, "w1")])


def test_reinit_draws_the_same_neurons_anew_in_all_matrices_of_an_expert(root: Path) -> None:
    out, plain = made(root, TWO + "reinit: {{ratio: 0.5}}\n"), made(root, TWO, out="plain")
    picked = []
    for layer in range(2):
        for expert in range(2):
            changed = []
            for name in ("w1", "w3", "w2"):
                before, after = (tensors[EXPERT.format(layer, expert, name)] for tensors in (plain, out))
                axis = 0 if name == "w2" else 1
                differs = (before != after).all(axis=axis)
                assert np.array_equal(differs, (before != after).any(axis=axis))  # a neuron is new, or as it was
                changed.append(differs)
                new, old = (np.compress(differs, each, axis=1 - axis) for each in (after, before))
                assert abs(new.std() / old.std() - 1) < 0.2
                assert abs(new.mean() - old.mean()) < 0.02
            assert np.array_equal(changed[0], changed[1])
            assert np.array_equal(changed[0], changed[2])
            assert changed[0].sum() == 16  # of 32
            picked.append(changed[0].tobytes())
    assert len(set(picked)) == 4


def test_reinit_matches_the_papers_statistics_exactly(root: Path) -> None:
    """Mean and deviation are those of the replaced entries: a hand-made matrix in which they are known."""
    out = made(root, TWO + "reinit: {{ratio: 1}}\n")
    before = load_file(root / "a" / "model.safetensors")["model.layers.0.mlp.up_proj.weight"].astype(np.float64)
    after = out[EXPERT.format(0, 0, "w3")]
    plan = planned(root, TWO + "reinit: {{ratio: 1}}\n")
    step = next(step for step in plan.steps if step.name == EXPERT.format(0, 0, "w3"))
    assert isinstance(step.inputs[0], Derived)
    normal = np.empty(after.size, np.float32)
    fill_normal(0, *split_key(step.inputs[0].parameters["key"]), 1.0, normal)
    np.testing.assert_allclose(after.ravel(), before.mean() + before.std() * normal, rtol=2e-5, atol=1e-7)


@pytest.mark.parametrize(("n", "ratio", "expected"), [(10, 0.5, 5), (10, 0.0, 0), (10, 1.0, 10), (7, 0.5, 3)])
def test_reinit_chooses_the_floor_of_the_share(n: int, ratio: float, expected: int) -> None:
    assert chosen(12345, n, ratio).sum() == expected


def test_random_numbers_are_those_of_their_distribution_at_any_offset() -> None:
    keys = split_key(0x123456789ABCDEF0)
    normal, uniform = np.empty(200_000, np.float32), np.empty(200_000, np.float32)
    fill_normal(0, *keys, 1.0, normal)
    fill_uniform(0, *keys, 0.5, uniform)
    assert abs(normal.mean()) < 0.01
    assert abs(normal.std() - 1) < 0.01
    assert abs((normal.astype(float) ** 4).mean() - 3) < 0.1
    assert abs(np.corrcoef(normal[:-1], normal[1:])[0, 1]) < 0.01
    assert -0.5 <= uniform.min() < -0.4999
    assert abs(uniform.std() - 1 / math.sqrt(12)) < 0.002
    part = np.empty(7, np.float32)
    fill_normal(1001, *keys, 1.0, part)
    assert np.array_equal(part, normal[1001:1008])
    # Beyond 2^32 elements the numbers do not begin anew.
    fill_normal((1 << 32) + 1001, *keys, 1.0, part)
    assert not np.array_equal(part, normal[1001:1008])


def test_normal_quantiles() -> None:
    from statistics import NormalDist

    for p in (1e-9, 1e-6, 0.001, 0.07, 0.075, 0.0751, 0.3, 0.5, 0.925, 0.9251, 0.99, 1 - 1e-9):
        assert normal_quantile(p) == pytest.approx(NormalDist().inv_cdf(p), rel=1e-6, abs=1e-9)


@pytest.mark.parametrize("mode", ["random", "uniform_random", "zero"])
def test_gates_without_prompts(root: Path, mode: str) -> None:
    out = made(root, TWO, mode)
    gates = np.stack([out[GATE.format(layer)] for layer in range(2)])
    assert gates.shape == (2, 2, 16)
    if mode == "zero":
        assert not gates.any()
    elif mode == "uniform_random":
        assert 0.2 < np.abs(gates).max() <= 0.25  # 1 / sqrt(16)
        assert len(np.unique(gates)) == gates.size
    else:
        assert 0.7 < gates.std() < 1.3
        assert len(np.unique(gates)) == gates.size


def test_cheap_embed_is_the_direction_of_the_summed_embeddings(root: Path) -> None:
    out = made(root, TWO, "cheap_embed")
    embedding = load_file(root / "a" / "model.safetensors")["model.embed_tokens.weight"].astype(np.float64)

    def direction(vector: np.ndarray) -> np.ndarray:
        return vector / np.linalg.norm(vector)

    first = direction(direction(embedding[[1, 2, 3]].sum(0)) - direction(embedding[9]))
    second = direction(embedding[[4, 5, 6]].sum(0))
    for layer in range(2):
        np.testing.assert_allclose(out[GATE.format(layer)], [first, second], rtol=1e-5, atol=1e-7)


def test_hidden_of_the_first_layer_is_the_last_tokens_embedding(root: Path) -> None:
    """By hand: before the first layer a token's state is its embedding."""
    embedding = load_file(root / "a" / "model.safetensors")["model.embed_tokens.weight"].astype(np.float64)
    last = made(root, TWO, "hidden", out="last")[GATE.format(0)]
    mean = made(root, TWO, "hidden_avg", out="mean")[GATE.format(0)]
    rows = {
        "last": [embedding[3] - embedding[9], (embedding[5] + embedding[6]) / 2],
        "mean": [embedding[[1, 2, 3]].mean(0) - embedding[9], (embedding[[4, 5]].mean(0) + embedding[6]) / 2],
    }
    for found, expected in ((last, rows["last"]), (mean, rows["mean"])):
        unit = [row / np.linalg.norm(row) for row in expected]
        np.testing.assert_allclose(found, unit, rtol=1e-5, atol=1e-7)


class _Stopped(Exception):
    pass


@pytest.mark.parametrize("at", [0, 4, 12])
def test_a_stopped_run_goes_on_to_the_same_bytes_without_running_the_prompts_again(
    root: Path, at: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = TWO.replace("source_model: {root}/b", "noise_scale: 0.1, source_model: {root}/b")
    made(root, text, "hidden", out="whole")
    plan, finish = planned(root, text, "hidden"), OutputDirectory.finish

    finished: list[int] = []

    def stop(directory: OutputDirectory, index: int, record: dict[str, Any]) -> None:
        if len(finished) == at:
            raise _Stopped
        finished.append(index)
        finish(directory, index, record)

    monkeypatch.setattr(OutputDirectory, "finish", stop)
    with pytest.raises(_Stopped):
        run_plan(plan, root / "out", threads=1)
    monkeypatch.setattr(OutputDirectory, "finish", finish)
    assert (root / "out.partial").is_dir()
    monkeypatch.setattr(
        merge.jobs.mixtures.gates._RouterPass, "run", lambda *_: pytest.fail("the prompts were run again")
    )
    report = run_plan(plan, root / "out", threads=2)
    assert report.resumed_tensors == at
    whole, resumed = ({p.name: p.read_bytes() for p in (root / name).iterdir()} for name in ("whole", "out"))
    assert whole == resumed


def test_half_found_gates_are_found_again(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made(root, TWO, "hidden", out="whole")
    keep, kept = merge.jobs.mixtures.gates._RouterPass._keep, []

    def stop(self: Any, number: int, states: Any) -> None:
        if number == 1 and not kept:
            kept.append(number)
            raise _Stopped
        keep(self, number, states)

    monkeypatch.setattr(merge.jobs.mixtures.gates._RouterPass, "_keep", stop)
    with pytest.raises(_Stopped):
        made(root, TWO, "hidden")
    assert b"gates 0" in (root / "out.partial" / "journal.jsonl").read_bytes()
    made(root, TWO, "hidden")
    assert (root / "out" / "model.safetensors").read_bytes() == (root / "whole" / "model.safetensors").read_bytes()


def test_any_number_of_threads_gives_the_same_router(root: Path) -> None:
    one, four = (made(root, TWO, "hidden", out=f"out{n}", threads=n) for n in (1, 4))
    assert all(np.array_equal(one[name], four[name]) for name in one)


def test_experts_in_other_dtypes_become_the_bases(root: Path, make_model: Callable[..., Path]) -> None:
    make_model(root / "b", seed=2, dtype="BF16")
    plan = planned(root, TWO)
    assert {step.dtype for step in plan.steps} == {"F32"}
    assert {step.dtype for step in planned(root, TWO + "dtype: bfloat16\n").steps} == {"BF16"}


def test_the_same_model_eight_times_is_read_from_one_place_and_said(root: Path) -> None:
    plan = planned(root, TWO.replace("{root}/b", "{root}/a"))
    assert [model.ref for model in plan.models] == [f"{root}/a"]
    assert any("all experts are the same model" in note for note in plan.notes)


def test_three_experts_are_no_power_of_two(root: Path) -> None:
    plan = planned(root, TWO + "  - {{source_model: {root}/a, positive_prompts: [w7]}}\n")
    assert any("3 experts are not a power of two" in note for note in plan.notes)


def test_mergekits_documented_examples_run_unchanged(tmp_path: Path, make_model: Callable[..., Path]) -> None:
    """docs/moe.md of mergekit, with small models under the names it uses."""
    names = [
        "BEE-spoke-data/smol_llama-220M-GQA",
        *("NousResearch/Hermes-2-Pro-Mistral-7B", "BioMistral/BioMistral-7B-DARE"),
        *("PocketDoc/Dans-AdventurousWinds-7b", "VAGOsolutions/SauerkrautLM-7b-HerO"),
    ]
    for seed, name in enumerate(names):
        make_model(tmp_path / name, seed=seed)
    same = "  - source_model: BEE-spoke-data/smol_llama-220M-GQA\n" * 8
    first = (
        f"base_model: {names[0]}\ngate_mode: random\ndtype: bfloat16\nexperts:\n{same}# and then train the sucker!\n"
    )
    second = """
base_model: NousResearch/Hermes-2-Pro-Mistral-7B
gate_mode: hidden
dtype: bfloat16
experts:
  - source_model: NousResearch/Hermes-2-Pro-Mistral-7B
    positive_prompts:
      - "<|im_start|>user\\nHello, who are you?<|im_end|>"
      - "<|im_start|>user\\nI need help with"
  - source_model: BioMistral/BioMistral-7B-DARE
    positive_prompts:
      - "As a doctor of medicine,"
  - source_model: PocketDoc/Dans-AdventurousWinds-7b
    positive_prompts:
      - "[Genres: Science Fiction]\\n[Tags: humor, old school, sci fi]"
      - "> get ye flask"
      - "[Mode: Interactive Storyteller]"
  - source_model: VAGOsolutions/SauerkrautLM-7b-HerO
    positive_prompts:
      - "<|im_start|>user\\nWie geht es dir?<|im_end|>"
      - "Das ist ein Satz auf Deutsch."
"""
    shared = second.replace("gate_mode: hidden", "gate_mode: hidden\narchitecture: qwen") + (
        "shared_experts:\n  - source_model: BioMistral/BioMistral-7B-DARE\n    positive_prompts:\n"
        '      - "blah blah"\n    residual_scale: 0.1\n'
    )
    for number, (text, layout) in enumerate(((first, "Mixtral"), (second, "Mixtral"), (shared, "Qwen2-MoE"))):
        file = tmp_path / f"{number}.yaml"
        file.write_text(text)
        plan = build_plan(parse_recipe(text, str(file)))
        assert plan.experts is not None
        assert plan.experts.layout == layout
        run_plan(plan, tmp_path / f"out{number}")
        assert not verify_output(tmp_path / f"out{number}").problems


def test_the_journal_has_the_router_as_float32(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kept: dict[str, str] = {}
    keep = merge.jobs.mixtures.gates._RouterPass._keep

    def watch(self: Any, number: int, states: Any) -> None:
        keep(self, number, states)
        kept.update(self._context.out.notes)

    monkeypatch.setattr(merge.jobs.mixtures.gates._RouterPass, "_keep", watch)
    out = made(root, TWO, "hidden")
    for layer in range(2):
        values = np.frombuffer(base64.b64decode(kept[f"gates {layer}"]), np.float32).reshape(2, 16)
        assert np.array_equal(out[GATE.format(layer)], values)


def test_float64_experts(root: Path, make_model: Callable[..., Path]) -> None:
    make_model(root / "a", seed=1, dtype="F64")
    text = TWO.replace("source_model: {root}/a", "noise_scale: 0.5, source_model: {root}/a")
    out = made(root, text, "hidden")
    assert {str(values.dtype) for values in out.values()} == {"float64"}
    plain = load_file(root / "a" / "model.safetensors")["model.layers.0.mlp.gate_proj.weight"]
    assert 0.3 < (out[EXPERT.format(0, 0, "w1")] - plain).std() < 0.7
