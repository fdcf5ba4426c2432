"""Stacks of architectures whose layers are not all alike, or lie in several lists: put right, or refused."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from architectures import loaded, saved
from safetensors.torch import load_file, save_file

from merge import build_plan, parse_recipe, run_plan
from merge.errors import RecipeError
from merge.plan import Plan

Tensors = dict[str, torch.Tensor]


def slices(*ranges: tuple[Path, int, int], method: str = "passthrough") -> Plan:
    rows = [f"- sources: [{{model: {path}, layer_range: [{first}, {last}]}}]\n" for path, first, last in ranges]
    return build_plan(parse_recipe(f"merge_method: {method}\nslices:\n" + "".join(rows)))


def test_parts_for_each_layer_go_with_their_layers(tmp_path: Path) -> None:
    """Gemma 3n, out of order, with layers of two models: columns of one tensor and rows of another."""
    a, b = saved(tmp_path / "a", "gemma3n_text"), saved(tmp_path / "b", "gemma3n_text", 2)
    plan = slices((tmp_path / "a", 0, 2), (tmp_path / "b", 4, 5), (tmp_path / "a", 1, 4))
    assert Plan.from_json(plan.to_json()) == plan
    run_plan(plan, tmp_path / "out", threads=1)
    out = loaded(a, tmp_path / "out")
    origins = [(a, 0), (a, 1), (b, 4), (a, 1), (a, 2), (a, 3)]
    for name, axis in (("embed_tokens_per_layer", 1), ("per_layer_model_projection", 0)):
        parts = [model.state_dict()[f"model.{name}.weight"].chunk(5, axis)[layer] for model, layer in origins]
        assert torch.equal(out[f"model.{name}.weight"], torch.cat(parts, axis))


def test_parts_for_each_layer_are_merged_slice_by_slice(tmp_path: Path) -> None:
    a, b = saved(tmp_path / "a", "gemma3n_text"), saved(tmp_path / "b", "gemma3n_text", 2)
    rows = "".join(
        f"- sources: [{{model: {tmp_path / 'a'}, layer_range: [{first}, {last}], parameters: {{weight: 0.25}}}}, "
        f"{{model: {tmp_path / 'b'}, layer_range: [{first}, {last}], parameters: {{weight: 0.75}}}}]\n"
        for first, last in ((0, 3), (1, 5))
    )
    run_plan(build_plan(parse_recipe("merge_method: linear\nslices:\n" + rows)), tmp_path / "out", threads=1)
    out = loaded(a, tmp_path / "out")
    for name, axis in (("embed_tokens_per_layer", 1), ("per_layer_model_projection", 0)):
        whole = [model.state_dict()[f"model.{name}.weight"].double() for model in (a, b)]
        chunks = (0.25 * whole[0] + 0.75 * whole[1]).float().chunk(5, axis)
        wanted = torch.cat([chunks[layer] for layer in (0, 1, 2, 1, 2, 3, 4)], axis)
        torch.testing.assert_close(out[f"model.{name}.weight"], wanted, rtol=1e-6, atol=0)
    with pytest.raises(RecipeError, match="a part for each layer"):
        build_plan(parse_recipe("merge_method: linear\nslices:\n" + rows.replace("0.25", "0.5", 1)))


def test_what_the_first_layer_alone_has_stays_in_the_first_layer(tmp_path: Path) -> None:
    """T5: the position bias of all layers lies in the first; the decoder here begins with another one."""
    model = saved(tmp_path / "a", "t5")
    sides = "".join(
        f"  {side}:\n    slices:\n"
        + "".join(f"    - sources: [{{model: {tmp_path / 'a'}, layer_range: [{i}, {i + 1}]}}]\n" for i in (1, 0, 1))
        for side in ("encoder", "decoder")
    )
    recipe = f"merge_method: passthrough\nbase_model: {tmp_path / 'a'}\nmodules:\n{sides}"
    run_plan(build_plan(parse_recipe(recipe)), tmp_path / "out", threads=1)
    out, before = loaded(model, tmp_path / "out"), model.state_dict()
    bias = "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight"
    assert torch.equal(out[bias], before[bias])
    query = "decoder.block.{}.layer.0.SelfAttention.q.weight"
    assert torch.equal(out[query.format(0)], before[query.format(1)])
    assert torch.equal(out[query.format(1)], before[query.format(0)])


def test_a_first_layer_without_a_norm_stays_the_first(tmp_path: Path) -> None:
    saved(tmp_path / "a", "modernbert")
    for ranges in ([(0, 4), (0, 4)], [(1, 4)]):
        with pytest.raises(RecipeError, match=r"no attn_norm\.weight"):
            slices(*((tmp_path / "a", *each) for each in ranges))


def test_layers_that_lie_in_several_lists_are_refused(tmp_path: Path) -> None:
    import transformers

    config = transformers.XLMConfig(vocab_size=40, emb_dim=16, n_layers=2, n_heads=2, max_position_embeddings=32)
    transformers.XLMWithLMHeadModel(config).save_pretrained(tmp_path / "a")
    with pytest.raises(RecipeError, match="are in several lists"):
        slices((tmp_path / "a", 0, 2), (tmp_path / "a", 1, 2))


def add_prediction_layer(path: Path) -> None:
    """A layer behind the last, as DeepSeek-V3's files have it for multi-token prediction."""
    tensors = load_file(path / "model.safetensors")
    last = {key: value for key, value in tensors.items() if re.match(r"model\.layers\.1\.", key)}
    more = {key.replace("layers.1.", "layers.2."): value.clone() for key, value in last.items()}
    more["model.layers.2.eh_proj.weight"] = torch.ones(16, 32)
    save_file(tensors | more, path / "model.safetensors", {"format": "pt"})
    config = json.loads((path / "config.json").read_text()) | {"num_nextn_predict_layers": 1}
    (path / "config.json").write_text(json.dumps(config))


def test_prediction_layers_are_no_layers_of_the_stack(tmp_path: Path) -> None:
    model = saved(tmp_path / "a", "deepseek_v3")
    saved(tmp_path / "b", "deepseek_v3", 2)
    add_prediction_layer(tmp_path / "a")
    plan = slices((tmp_path / "a", 0, 2), (tmp_path / "a", 1, 2))
    assert any("model.layers.2." in note and "left out" in note for note in plan.notes)
    run_plan(plan, tmp_path / "out", threads=1)
    out = load_file(tmp_path / "out" / "model.safetensors")
    query = "model.layers.{}.self_attn.q_a_proj.weight"
    assert torch.equal(out[query.format(2)], model.state_dict()[query.format(1)])
    assert not any("eh_proj" in key for key in out)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["num_nextn_predict_layers"] == 0
    with pytest.raises(RecipeError, match="The largest end is 2"):
        slices((tmp_path / "a", 0, 3))
    # Merged whole with a fine-tune that lacks it, it is copied.
    text = f"merge_method: linear\nmodels: [{{model: {tmp_path / 'a'}}}, {{model: {tmp_path / 'b'}}}]\n"
    run_plan(build_plan(parse_recipe(text + "parameters: {weight: 1}\n")), tmp_path / "whole", threads=1)
    assert torch.equal(
        load_file(tmp_path / "whole" / "model.safetensors")["model.layers.2.eh_proj.weight"], torch.ones(16, 32)
    )


def test_exceptions_by_layer_number_follow_their_layers(tmp_path: Path) -> None:
    from merge.output.layers import Restacked, restack

    config = {
        "model_type": "gemma4_text",
        "num_hidden_layers": 4,
        "per_layer_config": {"01": {"head_dim": 8}, "3": {"head_dim": 9}},
    }
    order = (0, 1, 2, 1, 2, 3)
    made = json.loads(json.dumps(config))
    restack(made, Restacked("default", 4, [("DIR", config, layer) for layer in order]))
    assert made["per_layer_config"] == {"1": {"head_dim": 8}, "3": {"head_dim": 8}, "5": {"head_dim": 9}}
