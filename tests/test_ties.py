"""Ties, aliases and keys that loading ignores: what a checkpoint means is what transformers makes of it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import loaded, saved
from safetensors.torch import load_file, save_file

from merge import build_plan, parse_recipe, run_plan
from merge.errors import RecipeError
from merge.plan import Plan
from merge.tools.convert import convert_plan

Tensors = dict[str, torch.Tensor]
LINEAR = "merge_method: linear\nmodels: [{{model: {a}}}, {{model: {b}}}]\nparameters: {{weight: 0.5}}\n"
COPY = "merge_method: passthrough\nmodels: [{{model: {a}}}]\n"


def rewrite(path: Path, change: Callable[[Tensors], None], **config: Any) -> None:
    """Changes a checkpoint's tensors, and its config: None takes a key out."""
    tensors = load_file(path / "model.safetensors")
    change(tensors)
    save_file({key: value.clone() for key, value in tensors.items()}, path / "model.safetensors", {"format": "pt"})
    values = json.loads((path / "config.json").read_text()) | config
    values = {key: value for key, value in values.items() if key not in config or value is not None}
    (path / "config.json").write_text(json.dumps(values))


def merged(text: str, out: Path, **models: Path) -> tuple[Plan, Tensors, dict[str, Any]]:
    plan = build_plan(parse_recipe(text.format(**models)))
    run_plan(plan, out, threads=1)
    return plan, load_file(out / "model.safetensors"), json.loads((out / "config.json").read_text())


def mean(a: Tensors, b: Tensors) -> Tensors:
    return {key: (0.5 * a[key].double() + 0.5 * b[key].double()).to(a[key].dtype) for key in a}


def equal(found: Tensors, wanted: Tensors) -> None:
    assert found.keys() == wanted.keys()
    assert [key for key in found if not torch.allclose(found[key], wanted[key], rtol=1e-6)] == []


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("name", "config", "is_tied"),
    [
        ("llava", {"tie_word_embeddings": True}, True),  # the top decides
        ("mistral3", {"tie_word_embeddings": True}, True),
        ("qwen2_5_vl", {"tie_word_embeddings": False}, False),
        ("llama4", {"tie_word_embeddings": True}, False),  # the text part does
    ],
)
def test_a_composite_config_is_read_as_transformers_reads_it(
    tmp_path: Path, name: str, config: dict[str, Any], is_tied: bool
) -> None:
    import transformers

    family = {}
    for file, seed in (("a", 1), ("b", 2)):
        model = saved(tmp_path / file, name, seed)
        values = json.loads((tmp_path / file / "config.json").read_text())
        values["text_config"]["tie_word_embeddings"] = False
        (tmp_path / file / "config.json").write_text(json.dumps(values | config))
        if is_tied:
            rewrite(tmp_path / file, lambda tensors: [tensors.pop(key) for key in list(tensors) if "lm_head" in key])
        elif model.all_tied_weights_keys:
            head = model.lm_head.weight.detach() * 1.5
            rewrite(tmp_path / file, lambda tensors, head=head: tensors.update({"lm_head.weight": head}))
        family[file] = loaded(model, tmp_path / file)
    assert transformers.AutoConfig.from_pretrained(tmp_path / "a").text_config.tie_word_embeddings is False
    _, tensors, after = merged(LINEAR, tmp_path / "out", a=tmp_path / "a", b=tmp_path / "b")
    assert after == json.loads((tmp_path / "a" / "config.json").read_text())
    assert any("lm_head" in key for key in tensors) is not is_tied
    equal(loaded(model, tmp_path / "out"), mean(family["a"], family["b"]))


@pytest.mark.parametrize("name", ["llama-tied", "qwen2", "gemma3_text", "mamba", "bert-masked", "t5"])
def test_a_head_of_its_own_is_kept_though_the_config_ties_it(tmp_path: Path, name: str) -> None:
    model = saved(tmp_path / "a", name)
    target, source = next((t, s) for t, s in model.all_tied_weights_keys.items() if t.endswith("weight"))
    rewrite(tmp_path / "a", lambda tensors: tensors.update({target: tensors[source] * 1.5}))
    before = loaded(model, tmp_path / "a")
    assert not torch.equal(before[target], before[source])
    plan, _, _ = merged(COPY, tmp_path / "copy", a=tmp_path / "a")
    assert any(f"config.json ties {target} to {source}" in note and "different values" in note for note in plan.notes)
    run_plan(convert_plan(str(tmp_path / "a")), tmp_path / "converted", threads=1)
    for out in (tmp_path / "copy", tmp_path / "converted"):
        equal(loaded(model, out), before)
        model.save_pretrained(tmp_path / "b")
    # With a tied model beside it, whose head is its embedding.
    _, _, config = merged(LINEAR, tmp_path / "out", a=tmp_path / "b", b=tmp_path / "a")
    equal(loaded(model, tmp_path / "out"), mean(loaded(model, tmp_path / "b"), before))
    assert name == "t5" or config["tie_word_embeddings"] is False


@pytest.mark.parametrize(
    "name", ["llama-tied", "mamba", "xlnet", "bert-pretraining", "bart", "whisper", "t5", "albert"]
)
def test_aliases_of_tied_weights_may_be_stored_in_one_input_only(tmp_path: Path, name: str) -> None:
    model = saved(tmp_path / "a", name)
    other = saved(tmp_path / "b", name, 2)
    before = json.loads((tmp_path / "a" / "config.json").read_text())
    state = other.state_dict()
    rewrite(tmp_path / "b", lambda tensors: tensors.update({key: state[key] for key in other.all_tied_weights_keys}))
    for number, (a, b) in enumerate((("a", "b"), ("b", "a"))):
        out = tmp_path / f"out{number}"
        _, tensors, config = merged(LINEAR, out, a=tmp_path / a, b=tmp_path / b)
        assert not set(tensors) & set(model.all_tied_weights_keys)
        equal(loaded(model, out), mean(model.state_dict(), state))
        assert config == before


def test_a_random_method_draws_once_for_a_tied_weight(tmp_path: Path) -> None:
    """Also where both names are stored: otherwise they would be two after the merge."""
    text = "merge_method: dare_linear\nbase_model: {base}\nmodels: [{{model: {a}}}]\n"
    text += "parameters: {{weight: 1, density: 0.5}}\n"
    models = {}
    for file, seed in (("base", 1), ("a", 2)):
        model = models[file] = saved(tmp_path / file, "bert-masked", seed)
        aliases = {key: model.state_dict()[key] for key in model.all_tied_weights_keys}
        rewrite(tmp_path / file, lambda tensors, aliases=aliases: tensors.update(aliases), tie_word_embeddings=None)
    _, _, config = merged(text, tmp_path / "out", base=tmp_path / "base", a=tmp_path / "a")
    assert "tie_word_embeddings" not in config
    state = loaded(models["a"], tmp_path / "out")
    for target, source in models["a"].all_tied_weights_keys.items():
        assert torch.equal(state[target], state[source])


def test_a_weight_stored_under_its_aliases_name_alone_is_the_weight(tmp_path: Path) -> None:
    model, other = saved(tmp_path / "a", "bart"), saved(tmp_path / "b", "bart", 2)
    rewrite(tmp_path / "b", lambda t: t.update({"model.decoder.embed_tokens.weight": t.pop("model.shared.weight")}))
    merged(LINEAR, tmp_path / "out", a=tmp_path / "a", b=tmp_path / "b")
    equal(loaded(model, tmp_path / "out"), mean(model.state_dict(), other.state_dict()))


@pytest.mark.parametrize(
    ("name", "key"),
    [
        ("llama-untied", "model.layers.0.self_attn.rotary_emb.inv_freq"),
        ("bert-masked", "bert.embeddings.position_ids"),
        ("gpt2", "transformer.h.0.attn.bias"),
        ("bart", "model.encoder.version"),
        ("marian", "model.encoder.embed_positions.weight"),
        ("qwen3_next", "mtp.norm.weight"),
    ],
)
def test_keys_that_loading_ignores_or_computes_may_be_in_one_input_only(tmp_path: Path, name: str, key: str) -> None:
    model, other = saved(tmp_path / "a", name), saved(tmp_path / "b", name, 2)
    extra = model.state_dict().get(key, torch.arange(8.0))
    rewrite(tmp_path / "b", lambda tensors: tensors.update({key: extra}))
    for number, (a, b) in enumerate((("a", "b"), ("b", "a"))):
        out = tmp_path / f"out{number}"
        plan, tensors, _ = merged(LINEAR, out, a=tmp_path / a, b=tmp_path / b)
        assert (key in tensors) is (a == "b")  # the first model's
        assert key not in tensors or torch.equal(tensors[key], extra)
        assert any(key in note and "do not read" in note for note in plan.notes)
        equal(loaded(model, out), mean(model.state_dict(), other.state_dict()))


@pytest.mark.parametrize(
    ("name", "key"),
    [
        ("gpt2", "transformer.h.0.attn.c_attn.bias"),  # matches what transformers would ignore: "attn.bias"
        ("gpt_neox", "gpt_neox.layers.0.attention.dense.bias"),
        ("llama-untied", "lm_head.weight"),
        ("bert-masked", "cls.predictions.bias"),
    ],
)
def test_a_weight_that_one_input_lacks_is_refused_as_ever(tmp_path: Path, name: str, key: str) -> None:
    saved(tmp_path / "a", name)
    saved(tmp_path / "b", name, 2)
    rewrite(tmp_path / "b", lambda tensors: tensors.pop(key))
    with pytest.raises(RecipeError, match="missing from"):
        merged(LINEAR, tmp_path / "out", a=tmp_path / "a", b=tmp_path / "b")


@pytest.mark.parametrize(("name", "key"), [("glm4_moe", "e_score_correction_bias"), ("xlnet", "rel_attn.q")])
def test_dtype_rounds_nothing_that_transformers_keeps_in_float32(tmp_path: Path, name: str, key: str) -> None:
    model = saved(tmp_path / "a", name)
    saved(tmp_path / "b", name, 2)
    wanted = type(model).from_pretrained(tmp_path / "a", dtype=torch.bfloat16).state_dict()
    run_plan(convert_plan(str(tmp_path / "a"), "bfloat16"), tmp_path / "converted", threads=1)
    merged(LINEAR + "dtype: bfloat16\n", tmp_path / "out", a=tmp_path / "a", b=tmp_path / "b")
    for out in ("converted", "out"):
        state = type(model).from_pretrained(tmp_path / out, dtype=torch.bfloat16).state_dict()
        assert {k: v.dtype for k, v in state.items()} == {k: v.dtype for k, v in wanted.items()}
        if out == "converted":
            equal(state, wanted)
        kept = [k for k in load_file(tmp_path / out / "model.safetensors") if key in k]
        assert kept
        assert all(load_file(tmp_path / out / "model.safetensors")[k].dtype == torch.float32 for k in kept)


def test_a_head_that_no_config_ties_is_tied_where_none_is_stored(tmp_path: Path) -> None:
    """transformers would draw one at random: the config says nothing, and nothing else can be meant."""
    model = saved(tmp_path / "a", "llama-tied")
    rewrite(tmp_path / "a", lambda tensors: None, tie_word_embeddings=None)
    _, _, config = merged(COPY, tmp_path / "out", a=tmp_path / "a")
    assert config["tie_word_embeddings"] is True
    equal(loaded(model, tmp_path / "out"), model.state_dict())


def test_a_true_flag_never_becomes_false_without_a_head(tmp_path: Path) -> None:
    """One model is tied; the other has no head and says that it is not tied."""
    saved(tmp_path / "a", "llama-tied")
    saved(tmp_path / "b", "llama-tied", 2)
    rewrite(tmp_path / "b", lambda tensors: None, tie_word_embeddings=False)
    with pytest.raises(RecipeError, match=r"lm_head\.weight: missing from"):
        merged(LINEAR, tmp_path / "out", a=tmp_path / "a", b=tmp_path / "b")


def test_names_of_other_writers_are_mapped_as_transformers_maps_them(tmp_path: Path) -> None:
    model, other = saved(tmp_path / "a", "llava"), saved(tmp_path / "b", "llava", 2)
    again = type(model).from_pretrained(tmp_path / "b")
    again.save_pretrained(tmp_path / "new", save_original_format=False)
    old, new = (set(load_file(tmp_path / file / "model.safetensors")) for file in ("a", "new"))
    assert old != new
    plan, tensors, _ = merged(LINEAR, tmp_path / "out", a=tmp_path / "a", b=tmp_path / "new")
    assert set(tensors) == old
    assert any("as transformers maps names" in note for note in plan.notes)
    equal(loaded(model, tmp_path / "out"), mean(model.state_dict(), other.state_dict()))


def test_old_names_of_layer_norms_are_known(tmp_path: Path) -> None:
    model, other = saved(tmp_path / "a", "bert-base"), saved(tmp_path / "b", "bert-base", 2)

    def change(tensors: Tensors) -> None:
        for key in list(tensors):
            old = key.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta")
            tensors[old] = tensors.pop(key)

    rewrite(tmp_path / "b", change)
    merged(LINEAR, tmp_path / "out", a=tmp_path / "a", b=tmp_path / "b")
    equal(loaded(model, tmp_path / "out"), mean(model.state_dict(), other.state_dict()))
