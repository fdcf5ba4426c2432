"""Plans: which tensor goes where, from headers alone; every problem at once."""

from __future__ import annotations

import itertools
import json
import pydoc
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from headers import LLAMA_70B, MISTRAL_7B, write_headers, write_llama

import merge
from merge import build_plan, parse_recipe
from merge.architecture import find_stacks, is_embedding, is_head, is_input_side, main_stack
from merge.engine.costs import work as matrix_cost
from merge.engine.memory import budget
from merge.errors import RecipeError, UsageError
from merge.plan import Derived, Plan
from merge.planning.common_names import map_prefix

TINY = {"layers": 4, "hidden": 8, "intermediate": 16, "vocabulary": 32, "heads": 2, "kv_heads": 1}


def side_text(plan: Plan, name: str) -> str:
    return next(file.text or "" for file in plan.side_files if file.name == name)


def test_a_70b_plan_reads_headers_only(tmp_path: Path) -> None:
    for name in ("base", "a", "b"):
        write_llama(tmp_path / name, LLAMA_70B)
    text = f"merge_method: ties\nbase_model: {tmp_path}/base\nmodels:\n"
    text += "".join(f"- model: {tmp_path}/{name}\n  parameters: {{weight: 0.5, density: 0.5}}\n" for name in "ab")
    plan = build_plan(parse_recipe(text))
    assert len(plan.steps) == 723
    assert plan.n_parameters == 68_976_648_192
    assert plan.bytes_read == 3 * 2 * plan.n_parameters
    assert len(plan.shards) == 29
    assert max(shard.size for shard in plan.shards) <= 5_000_000_000 + 100_000
    assert budget(plan, 2, None).peak < 1 << 30


def test_goliath_is_137_layers(tmp_path: Path) -> None:
    for name in "XE":
        write_llama(tmp_path / name, LLAMA_70B)
    ends = ((0, 16), (8, 24), (17, 32), (25, 40), (33, 48), (41, 56), (49, 64), (57, 72), (65, 80))
    slices = [
        f"- sources:\n  - model: {tmp_path}/{model}\n    layer_range: [{start}, {end}]\n"
        for model, (start, end) in zip(itertools.cycle("XE"), ends, strict=False)
    ]
    plan = build_plan(parse_recipe("merge_method: passthrough\nslices:\n" + "".join(slices) + "dtype: bfloat16\n"))
    assert json.loads(side_text(plan, "config.json"))["num_hidden_layers"] == 137
    assert {step.method for step in plan.steps} == {"copy"}
    names = {step.name for step in plan.steps}
    assert "model.layers.136.mlp.up_proj.weight" in names
    assert "model.layers.137.mlp.up_proj.weight" not in names
    step = next(step for step in plan.steps if step.name == "model.layers.16.self_attn.q_proj.weight")
    assert step.inputs[0].name == "model.layers.8.self_attn.q_proj.weight"
    assert plan.models[step.models[0]].path.endswith("E")
    assert [model.ref[-1] for model in plan.models] == ["X", "E"]  # the donor is the first one listed


def test_solar_has_10_731_524_096_parameters(tmp_path: Path) -> None:
    write_llama(tmp_path / "m", MISTRAL_7B)
    text = "merge_method: passthrough\nslices:\n" + "".join(
        f"- sources: [{{model: {tmp_path}/m, layer_range: [{start}, {end}]}}]\n" for start, end in ((0, 24), (8, 32))
    )
    assert build_plan(parse_recipe(text)).n_parameters == 10_731_524_096


def test_gradients_run_over_the_slice_and_stop_at_its_edge(tmp_path: Path) -> None:
    for name in "ab":
        write_llama(tmp_path / name, TINY, shards=1)
    text = f"""
merge_method: slerp
base_model: {tmp_path}/a
slices:
  - sources: [{{model: {tmp_path}/a, layer_range: [0, 3]}}, {{model: {tmp_path}/b, layer_range: [1, 4]}}]
  - sources: [{{model: {tmp_path}/b, layer_range: [3, 4]}}, {{model: {tmp_path}/a, layer_range: [3, 4]}}]
parameters:
  t:
    - {{filter: mlp, value: [0.2, 0.4]}}
    - value: [0, 1]
"""
    plan = build_plan(parse_recipe(text))
    t = {step.name: step.parameters["t"] for step in plan.steps}
    assert [t[f"model.layers.{i}.mlp.up_proj.weight"] for i in range(4)] == pytest.approx([0.2, 0.3, 0.4, 0.4])
    assert [t[f"model.layers.{i}.self_attn.q_proj.weight"] for i in range(4)] == [0.0, 0.5, 1.0, 1.0]
    assert t["model.embed_tokens.weight"] == t["lm_head.weight"] == t["model.norm.weight"] == 0.0
    last = next(step for step in plan.steps if step.name == "model.layers.3.mlp.up_proj.weight")
    assert [plan.models[model].ref[-1] for model in last.models] == ["a", "b"]  # the base is the t = 0 end


def test_every_problem_is_reported_at_once(tmp_path: Path, make_model: Callable[..., Path]) -> None:
    make_model(tmp_path / "base")
    odd = {"model.layers.0.mlp.up_proj.weight": np.zeros((3, 16), np.float32), "extra.bias": np.zeros(3, np.float32)}
    make_model(tmp_path / "a", seed=1, extra=odd)
    text = f"""
merge_method: ties
base_model: {tmp_path}/base
models:
  - model: {tmp_path}/a
    parameters:
      weight: [{{filter: self_attn, value: 1}}]
"""
    with pytest.raises(RecipeError) as caught:
        build_plan(parse_recipe(text))
    message = str(caught.value)
    assert (
        f"model.layers.0.mlp.up_proj.weight: shapes differ: {tmp_path}/base [32, 16], {tmp_path}/a [3, 16]." in message
    )
    assert f"extra.bias: missing from {tmp_path}/base; found in {tmp_path}/a." in message
    assert f'"weight" of {tmp_path}/a has no value for model.embed_tokens.weight' in message


def test_leniencies_are_noted(tmp_path: Path, make_model: Callable[..., Path]) -> None:
    make_model(tmp_path / "base")
    odd = {"model.layers.0.mlp.up_proj.weight": np.zeros((3, 16), np.float32), "extra.bias": np.ones(3, np.float32)}
    make_model(tmp_path / "a", seed=1, extra=odd)
    text = f"merge_method: task_arithmetic\nbase_model: {tmp_path}/base\nmodels:\n- model: {tmp_path}/a\n"
    text += "  parameters: {weight: 1}\nallow: [missing_tensors, shape_mismatch]\n"
    plan = build_plan(parse_recipe(text))
    steps = {step.name: step for step in plan.steps}
    assert steps["model.layers.0.mlp.up_proj.weight"].shape == (32, 16)
    assert plan.models[steps["extra.bias"].models[0]].ref.endswith("/a")
    assert len(plan.notes) == 2


def test_a_tied_model_and_an_untied_one_merge_into_an_untied_one(
    tmp_path: Path, make_model: Callable[..., Path]
) -> None:
    make_model(tmp_path / "tied", tied=True)
    make_model(tmp_path / "untied", seed=1)
    text = "merge_method: linear\nmodels:\n" + "".join(
        f"- model: {tmp_path}/{name}\n  parameters: {{weight: 1}}\n" for name in ("tied", "untied")
    )
    plan = build_plan(parse_recipe(text))
    head = next(step for step in plan.steps if step.name == "lm_head.weight")
    assert [ref.name for ref in head.inputs] == ["model.embed_tokens.weight", "lm_head.weight"]
    assert json.loads(side_text(plan, "config.json"))["tie_word_embeddings"] is False
    alone = text.replace("/untied", "/tied")
    tied = build_plan(parse_recipe(alone))
    assert "lm_head.weight" not in {step.name for step in tied.steps}
    assert json.loads(side_text(tied, "config.json"))["tie_word_embeddings"] is True


def test_a_prefix_that_makes_the_difference_is_mapped_and_said(tmp_path: Path) -> None:
    shapes = {"embeddings.word_embeddings.weight": (8, 4), "encoder.layer.0.dense.weight": (4, 4)}
    config = {"num_hidden_layers": 1, "model_type": "bert"}
    write_headers(tmp_path / "plain", shapes, config)
    write_headers(tmp_path / "bert", {f"bert.{name}": shape for name, shape in shapes.items()}, config)
    text = "merge_method: linear\nmodels:\n" + "".join(
        f"- model: {tmp_path}/{name}\n  parameters: {{weight: 1}}\n" for name in ("bert", "plain")
    )
    plan = build_plan(parse_recipe(text))
    assert [step.name for step in plan.steps] == [
        "bert.embeddings.word_embeddings.weight",
        "bert.encoder.layer.0.dense.weight",
    ]
    assert [ref.name for ref in plan.steps[1].inputs] == [
        "bert.encoder.layer.0.dense.weight",
        "encoder.layer.0.dense.weight",
    ]
    assert '"bert." put before tensor names' in plan.notes[0]


def test_prefixes_are_not_guessed() -> None:
    assert map_prefix(["a.x", "a.y"], ["a.x", "a.y"]) is None
    assert map_prefix(["model.x", "model.y"], ["x", "y", "z"]) == ("model.", "")
    assert map_prefix(["x"], ["a.x", "b.x"]) is None  # two prefixes would do
    assert map_prefix(["p.q"], ["r.s"]) is None


def test_stacks_are_found_by_name_and_confirmed_by_the_config() -> None:
    names = [f"vision.blocks.{i}.w" for i in range(3)] + [
        f"model.layers.{i}.experts.{j}.w" for i in range(2) for j in range(8)
    ]
    config = {"text_config": {"num_hidden_layers": 2}, "vision_config": {"depth": 3}}
    stacks = find_stacks(names, config)
    assert [(stack.prefix, stack.n_layers) for stack in stacks] == [("vision.blocks.", 3), ("model.layers.", 2)]
    main = main_stack(stacks, config)
    assert main is not None
    assert main.layer("model.layers.1.experts.7.w") == (1, "experts.7.w")
    assert main.layer("model.norm.weight") is None


def test_roles_outside_the_stack() -> None:
    assert is_embedding("model.embed_tokens.weight")
    assert is_embedding("transformer.wte.weight")
    assert is_head("lm_head.weight")
    assert not is_head("model.layers.0.attention.output.dense.weight")
    assert is_input_side("transformer.wpe.weight")
    assert is_input_side("bert.embeddings.LayerNorm.weight")
    assert not is_input_side("model.norm.weight")


def test_lists_with_an_entry_for_each_layer_are_restacked(tmp_path: Path) -> None:
    write_llama(tmp_path / "m", TINY, shards=1)
    config = json.loads((tmp_path / "m" / "config.json").read_text())
    config["layer_types"] = ["full", "sliding", "full", "linear"]
    (tmp_path / "m" / "config.json").write_text(json.dumps(config))
    text = "merge_method: passthrough\nslices:\n" + "".join(
        f"- sources: [{{model: {tmp_path}/m, layer_range: [{start}, {end}]}}]\n" for start, end in ((0, 3), (1, 4))
    )
    written = json.loads(side_text(build_plan(parse_recipe(text)), "config.json"))
    assert written["num_hidden_layers"] == 6
    assert written["layer_types"] == ["full", "sliding", "full", "sliding", "full", "linear"]


def test_a_layer_range_behind_the_last_layer_is_named(tmp_path: Path) -> None:
    write_llama(tmp_path / "m", TINY, shards=1)
    text = f"merge_method: passthrough\nslices:\n- sources: [{{model: {tmp_path}/m, layer_range: [2, 6]}}]\n"
    with pytest.raises(RecipeError, match=r"\[2, 6\] ends after the last layer: .*/m has 4 layers"):
        build_plan(parse_recipe(text))


def test_a_memory_budget_is_kept_or_refused(tmp_path: Path) -> None:
    write_llama(tmp_path / "m", MISTRAL_7B)
    text = "merge_method: linear\nmodels:\n" + f"- model: {tmp_path}/m\n  parameters: {{weight: 1}}\n" * 2
    plan = build_plan(parse_recipe(text))
    roomy = budget(plan, 8, None, block_chunks=64)
    tight = budget(plan, 8, 190 << 20, block_chunks=64)
    assert tight.peak <= 190 << 20 < roomy.peak
    assert tight.block_chunks < 64
    with pytest.raises(UsageError, match="--max-ram 20MiB is too little: this merge needs"):
        budget(plan, 8, 20 << 20)


def test_a_plan_says_what_decomposing_matrices_takes(tmp_path: Path, call_cli: Callable[..., Any]) -> None:
    for name in ("base", "a", "b"):
        write_llama(tmp_path / name, MISTRAL_7B)

    def plan(method: str) -> Plan:
        text = f"merge_method: {method}\nbase_model: {tmp_path}/base\nmodels:\n"
        more = "  parameters: {weight: 0.5}\n" if method == "ties" else ""
        return build_plan(parse_recipe(text + "".join(f"- model: {tmp_path}/{name}\n{more}" for name in "ab")))

    steps = {step.name: step for step in plan("wudi").steps}
    square, wide, norm = (
        steps[f"model.layers.0.{name}.weight"] for name in ("self_attn.q_proj", "mlp.down_proj", "input_layernorm")
    )
    assert matrix_cost(norm) == (0.0, 0)
    assert matrix_cost(wide)[0] == pytest.approx(matrix_cost(square)[0] * 3.5**2)
    assert matrix_cost(wide)[1] >= 8 * 4 * 14336**2
    assert budget(plan("tsv"), 1, None).peak > budget(plan("pcb"), 1, None).peak
    assert all(matrix_cost(step) == (0.0, 0) for step in plan("ties").steps)

    (tmp_path / "wudi.yaml").write_text(
        f"merge_method: wudi\nbase_model: {tmp_path}/base\nmodels: [{{model: {tmp_path}/a}}, {{model: {tmp_path}/b}}]\n"
    )
    _, shown, _ = call_cli(["plan", str(tmp_path / "wudi.yaml"), "--threads", "4"])
    assert re.search(
        r"^matrices about [\d.]+ (s|min|h), 226 matrices to decompose, up to [\d,]+ MiB for each", shown, re.M
    )
    _, shown, _ = call_cli(["plan", str(tmp_path / "wudi.yaml"), "--json"])
    assert json.loads(shown)["matrix_tensors"] == 226


def test_tokenizers_that_number_tokens_otherwise_are_said(tmp_path: Path, make_model: Callable[..., Path]) -> None:
    for seed, name in enumerate("ab"):
        make_model(tmp_path / name, seed=seed)
    tokenizer = json.loads((tmp_path / "b" / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    vocabulary["w1"], vocabulary["w2"] = vocabulary["w2"], vocabulary["w1"]
    (tmp_path / "b" / "tokenizer.json").write_text(json.dumps(tokenizer))
    text = "merge_method: linear\nmodels:\n" + "".join(
        f"- model: {tmp_path}/{name}\n  parameters: {{weight: 1}}\n" for name in "ab"
    )
    assert "2 tokens are missing or numbered otherwise, 0 are new" in build_plan(parse_recipe(text)).notes[0]
    plan = build_plan(parse_recipe(text + f"tokenizer_source: {tmp_path}/a\n"))
    derived = {step.name: [isinstance(ref, Derived) for ref in step.inputs] for step in plan.steps}
    assert derived["model.embed_tokens.weight"] == derived["lm_head.weight"] == [False, True]


# --- for people ----------------------------------------------------------------------------------------------------


def test_a_plan_shows_itself_in_a_line_and_in_a_table(tmp_path: Path, make_model: Callable[..., Path]) -> None:
    a, b = (make_model(tmp_path / f"<{name}>", seed=i, layers=12) for i, name in enumerate("ab"))
    text = f"merge_method: linear\nmodels: [{{model: {a}}}, {{model: {b}}}]\nparameters: {{weight: 1}}\nname: n\n"
    plan = build_plan(parse_recipe(text))
    size = f"{plan.n_parameters:,} parameters, {plan.bytes_written:,} bytes"
    assert repr(plan) == str(plan) == f"Plan('n': linear of 2 models, 111 tensors, {size})"
    html = plan._repr_html_()
    assert html.startswith("<table><caption>n</caption>")
    assert "&lt;a&gt;" in html
    assert "<a>" not in html
    assert len(html) < 2000


def test_help_shows_the_functions() -> None:
    text = pydoc.plain(pydoc.render_doc(merge))
    for name in merge.__all__:
        assert f"\n    {name}(" in text, name
