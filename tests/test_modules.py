"""Models of several towers: a vision-language model merged with a language model, encoders and decoders apart."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from headers import write_headers
from safetensors.torch import load_file
from tiny_models import sizes

from merge import build_plan, parse_recipe, run_plan
from merge.errors import RecipeError
from merge.jobs.stacks.modules import Modules

Tensors = dict[str, torch.Tensor]
TEXT = {
    key: value for key, value in sizes(vocabulary=40).items() if key != "tie_word_embeddings"
}  # that is the class's
VISION = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}


def saved(path: Path, model: Any, seed: int) -> Path:
    torch.manual_seed(seed)
    for parameter in model.parameters():
        parameter.data += torch.randn_like(parameter) * 0.1
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.save_pretrained(path)
    return path


def llava(path: Path, seed: int) -> Path:
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

    config = LlavaConfig(
        vision_config=CLIPVisionConfig(**VISION, image_size=8, patch_size=4, projection_dim=16),
        text_config=LlamaConfig(**TEXT),
        image_token_index=39,
        vision_feature_layer=-1,
    )
    return saved(path, LlavaForConditionalGeneration(config), seed)


def qwen_vl(path: Path, seed: int) -> Path:
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    rope = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 10000.0}
    vision = {"depth": 2, "hidden_size": 16, "intermediate_size": 24, "num_heads": 2, "out_hidden_size": 16}
    config = Qwen2_5_VLConfig(
        text_config={**TEXT, "rope_parameters": rope},
        vision_config=vision | {"patch_size": 4, "fullatt_block_indexes": [1]},
    )
    return saved(path, Qwen2_5_VLForConditionalGeneration(config), seed)


def gemma_vl(path: Path, seed: int) -> Path:
    from transformers import Gemma3Config, Gemma3ForConditionalGeneration, Gemma3TextConfig, SiglipVisionConfig

    config = Gemma3Config(
        text_config=Gemma3TextConfig(**TEXT),
        vision_config=SiglipVisionConfig(**VISION, image_size=8, patch_size=4),
        mm_tokens_per_image=4,
        image_token_index=39,
    )
    return saved(path, Gemma3ForConditionalGeneration(config), seed)


def language_model(path: Path, seed: int, kind: str = "Llama") -> Path:
    import transformers

    name = {"Llama": "Llama", "Qwen": "Qwen2", "Gemma": "Gemma3Text"}[kind]
    config = getattr(transformers, f"{name}Config")(**TEXT)
    model = {"Gemma": "Gemma3"}.get(kind, name)
    return saved(path, getattr(transformers, f"{model}ForCausalLM")(config), seed)


PAIRS = [("llava", "Llama"), ("qwen_vl", "Qwen"), ("gemma_vl", "Gemma")]
MAKERS: dict[str, Callable[[Path, int], Path]] = {"llava": llava, "qwen_vl": qwen_vl, "gemma_vl": gemma_vl}


def weights(path: Path) -> Tensors:
    return {name: tensor for file in sorted(path.glob("*.safetensors")) for name, tensor in load_file(file).items()}


def run(text: str, out: Path) -> tuple[Tensors, tuple[str, ...]]:
    plan = build_plan(parse_recipe(text))
    run_plan(plan, out, threads=1)
    return weights(out), plan.notes


def loaded(path: Path) -> Any:
    """As transformers loads it, with every weight there and none left over."""
    import transformers

    architecture = json.loads((path / "config.json").read_text())["architectures"][0]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model, info = getattr(transformers, architecture).from_pretrained(path, output_loading_info=True)
    assert not any(info.values()), info
    return model.eval()


def is_text(name: str) -> bool:
    return not any(part in name for part in ("vision", "visual", "projector"))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("kind", "text"), PAIRS)
@pytest.mark.parametrize("by_modules", [True, False])
def test_a_vision_language_model_takes_in_a_language_model(
    tmp_path: Path, kind: str, text: str, by_modules: bool
) -> None:
    vlm, lm = MAKERS[kind](tmp_path / "vlm", 1), language_model(tmp_path / "lm", 2, text)
    models = f"[{{model: {vlm}, parameters: {{weight: 0.25}}}}, {{model: {lm}, parameters: {{weight: 0.75}}}}]"
    part = f"modules:\n  text_decoder:\n    models: {models}\n" if by_modules else f"models: {models}\n"
    got, notes = run(f"merge_method: linear\nbase_model: {vlm}\n{part}", tmp_path / "out")
    before, other = weights(vlm), weights(lm)
    assert got.keys() == before.keys()
    n_merged = 0
    for name, tensor in got.items():
        if is_text(name):
            (theirs,) = {key for key in other if f".{name}".endswith("." + key.removeprefix("model."))}
            torch.testing.assert_close(tensor, 0.25 * before[name] + 0.75 * other[theirs], rtol=1e-6, atol=1e-7)
            n_merged += 1
        else:
            assert torch.equal(tensor, before[name])
    assert n_merged == len(other)
    assert any("vision_tower" in note and "copied" in note for note in notes)
    ids = torch.tensor([[1, 2, 3, 4]])
    with torch.no_grad():
        assert torch.isfinite(loaded(tmp_path / "out")(input_ids=ids, attention_mask=torch.ones_like(ids)).logits).all()


@pytest.mark.filterwarnings("ignore")
def test_towers_are_merged_apart_each_with_its_own_method_and_slices(tmp_path: Path) -> None:
    a, b = llava(tmp_path / "a", 1), llava(tmp_path / "b", 2)
    text = f"""
merge_method: passthrough
base_model: {a}
modules:
  language_model:
    slices:
      - sources: [{{model: {a}, layer_range: [0, 2]}}]
      - sources: [{{model: {b}, layer_range: [1, 3]}}]
  vision_tower:
    merge_method: linear
    models:
      - {{model: {a}, parameters: {{weight: 1}}}}
      - {{model: {b}, parameters: {{weight: 1}}}}
"""
    got, notes = run(text, tmp_path / "out")
    of_a, of_b = weights(a), weights(b)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["text_config"]["num_hidden_layers"] == 4
    assert config["vision_config"]["num_hidden_layers"] == 2
    layer = next(name for name in of_a if "layers.1.self_attn.q_proj" in name and is_text(name))
    assert torch.equal(got[layer], of_a[layer])
    assert torch.equal(got[layer.replace("layers.1.", "layers.2.")], of_b[layer])
    assert torch.equal(got[layer.replace("layers.1.", "layers.3.")], of_b[layer.replace("layers.1.", "layers.2.")])
    for name in got:
        if "vision_tower" in name:
            torch.testing.assert_close(got[name], (of_a[name] + of_b[name]) / 2)
        elif "projector" in name:
            assert torch.equal(got[name], of_a[name])
    assert any("multi_modal_projector (4 tensors)" in note for note in notes)
    loaded(tmp_path / "out")


@pytest.mark.filterwarnings("ignore")
def test_only_the_vision_tower_is_stacked(tmp_path: Path) -> None:
    path = llava(tmp_path / "a", 1)
    first, second = (f"{{sources: [{{model: {path}, layer_range: {span}}}]}}" for span in ("[0, 2]", "[1, 2]"))
    part = f"slices: [{first}, {second}]"
    got, _ = run(f"merge_method: passthrough\nmodules:\n  vision_tower:\n    {part}\n", tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (config["vision_config"]["num_hidden_layers"], config["text_config"]["num_hidden_layers"]) == (3, 3)
    assert {name for name in weights(path) if is_text(name)} == {name for name in got if is_text(name)}
    loaded(tmp_path / "out")


def t5(path: Path, seed: int) -> Path:
    from transformers import T5Config, T5ForConditionalGeneration

    sizes = {"d_model": 16, "d_kv": 8, "num_heads": 2, "d_ff": 24, "num_layers": 3, "num_decoder_layers": 3}
    return saved(path, T5ForConditionalGeneration(T5Config(vocab_size=40, **sizes, decoder_start_token_id=0)), seed)


def bart(path: Path, seed: int) -> Path:
    from transformers import BartConfig, BartForConditionalGeneration

    sizes = {f"{side}_{key}": n for side in ("encoder", "decoder") for key, n in SIDES.items()}
    config = BartConfig(vocab_size=40, d_model=16, max_position_embeddings=32, **sizes, pad_token_id=0)
    return saved(path, BartForConditionalGeneration(config), seed)


SIDES = {"layers": 3, "attention_heads": 2, "ffn_dim": 24}
KEYS = {"t5": ("num_layers", "num_decoder_layers"), "bart": ("encoder_layers", "decoder_layers")}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["t5", "bart"])
@pytest.mark.parametrize("side", [0, 1])
def test_one_side_of_an_encoder_decoder_is_made_deeper(tmp_path: Path, kind: str, side: int) -> None:
    path = {"t5": t5, "bart": bart}[kind](tmp_path / "a", 1)
    parts = "".join(f"\n      - sources: [{{model: {path}, layer_range: {span}}}]" for span in ("[0, 2]", "[1, 3]"))
    name = ("encoder", "decoder")[side]
    got, notes = run(f"merge_method: passthrough\nmodules:\n  {name}:\n    slices:{parts}\n", tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert [config[key] for key in KEYS[kind]] == ([4, 3] if side == 0 else [3, 4])
    before = weights(path)
    for tensor in got:
        assert f"{name}." in tensor or torch.equal(got[tensor], before[tensor])
    assert any("layer 1 of" in note and "used twice" in note for note in notes)
    with torch.no_grad():
        out = loaded(tmp_path / "out")(input_ids=torch.tensor([[1, 2]]), decoder_input_ids=torch.tensor([[0, 3]]))
    assert torch.isfinite(out.logits).all()


def problem(text: str) -> str:
    with pytest.raises(RecipeError) as raised:
        build_plan(parse_recipe(text, "r.yaml"))
    return str(raised.value)


def headers(path: Path) -> Path:
    shapes: dict[str, tuple[int, ...]] = {f"model.layers.{i}.mlp.up_proj.weight": (4, 2) for i in range(2)}
    shapes |= {f"visual.blocks.{i}.mlp.fc1.weight": (4, 2) for i in range(3)} | {"visual.merger.mlp.0.weight": (2, 2)}
    config = {"model_type": "qwen2_vl", "num_hidden_layers": 2, "vision_config": {"depth": 3}}
    return write_headers(path, shapes | {"model.embed_tokens.weight": (8, 2)}, config)


def test_unknown_modules_are_told_with_those_that_are_there(tmp_path: Path) -> None:
    path = headers(tmp_path / "a")
    part = f"models: [{{model: {path}}}]"
    said = problem(f"merge_method: passthrough\nmodules:\n  vision_towr: {{{part}}}")
    assert said.startswith(f'r.yaml:3: there is no module "vision_towr" in {path}, which has ')
    for expected in ("multi_modal_projector (visual.merger.mlp.*, 1 tensor)", 'Did you mean "vision_tower"?'):
        assert expected in said
    said = problem(f"merge_method: passthrough\nmodules:\n  vision_tower: {{{part}}}\n  visual: {{{part}}}")
    assert '"visual" and "vision_tower" are the same module' in said
    said = problem("merge_method: passthrough\nmodules:\n  text_decoder: {parameters: {scale: 1}}")
    assert said == 'r.yaml:3: module "text_decoder" needs either "models" or "slices", and has neither'
    said = problem(f"merge_method: passthrough\nmodules:\n  text_decoder: {{{part}, merge_method: liner}}")
    assert 'r.yaml:3: unknown method "liner"; did you mean "linear"?' in said
    said = problem(f"merge_method: passthrough\nmodules:\n  text_decoder: {{{part}, parameters: {{weight: 1}}}}")
    assert 'r.yaml:3: "weight" is a parameter of' in said
    said = problem(f"merge_method: slerp\nmodules:\n  visual.blocks: {{{part}}}")
    assert 'module visual.blocks, "models": slerp merges exactly 2 models, and 1 is listed' in said
    span = f"slices: [{{sources: [{{model: {path}, layer_range: [0, 3]}}]}}]"
    said = problem(f"merge_method: passthrough\nmodules:\n  text_decoder: {{{span}}}")
    assert "layer_range [0, 3] ends after the last layer" in said
    plan = build_plan(parse_recipe(f"merge_method: passthrough\nmodules:\n  vision_tower: {{{span}}}"))
    assert len(plan.steps) == 7


def test_the_donor_of_the_config_has_the_towers(tmp_path: Path) -> None:
    vlm = headers(tmp_path / "vlm")
    shapes: dict[str, tuple[int, ...]] = {f"model.layers.{i}.mlp.up_proj.weight": (4, 2) for i in range(2)}
    shapes |= {"model.embed_tokens.weight": (8, 2)}
    lm = write_headers(tmp_path / "lm", shapes, {"model_type": "qwen2", "num_hidden_layers": 2})
    models = f"models: [{{model: {lm}}}, {{model: {vlm}}}]\nparameters: {{weight: 1}}"
    assert problem(f"merge_method: linear\n{models}") == (
        f"r.yaml:2: {vlm} has a vision_tower and a multi_modal_projector, and {lm}, which gives config.json, has none. "
        "Name the model that has it as base_model, or list it first."
    )
    plan = build_plan(parse_recipe(f"merge_method: linear\nbase_model: {vlm}\n{models}"))
    assert {step.name.split(".")[0]: step.method for step in plan.steps} == {"model": "linear", "visual": "copy"}


def test_a_module_may_be_named_by_the_beginning_of_its_tensors_names(tmp_path: Path) -> None:
    path = headers(tmp_path / "a")
    models = f"models: [{{model: {path}, parameters: {{scale: 2}}}}]"
    plan = build_plan(parse_recipe(f"merge_method: passthrough\nmodules:\n  visual.blocks: {{{models}}}\n"))
    assert {step.name for step in plan.steps if step.parameters} == {
        f"visual.blocks.{i}.mlp.fc1.weight" for i in range(3)
    }
    plan = build_plan(
        parse_recipe(
            f"merge_method: passthrough\nmodules:\n  visual: {{models: [{{model: {path}}}]}}\n  default: {{{models}}}\n"
        )
    )
    assert {step.name.split(".")[0] for step in plan.steps if step.parameters} == {"model", "visual"}
    assert not plan.steps[[step.name for step in plan.steps].index("visual.blocks.0.mlp.fc1.weight")].parameters


@pytest.mark.parametrize(
    ("name", "module"),
    [
        ("model.layers.0.x", "text_decoder"),
        ("lm_head.weight", "text_decoder"),
        ("model.language_model.layers.0.x", "text_decoder"),
        ("model.visual.blocks.0.x", "vision_tower"),
        ("model.visual.deepstack_merger_list.0.norm.weight", "multi_modal_projector"),
        ("vision_tower.vision_model.encoder.layers.0.x", "vision_tower"),
        ("model.multi_modal_projector.linear_1.weight", "multi_modal_projector"),
        ("model.image_newline", "multi_modal_projector"),
        ("audio_tower.layers.0.x", "audio_tower"),
    ],
)
def test_modules_by_name(name: str, module: str) -> None:
    assert Modules([name, "model.layers.0.x", "visual.blocks.0.x"]).of(name) == module


def test_a_model_of_one_tower_is_the_default_module() -> None:
    assert Modules(["model.layers.0.x", "lm_head.weight"]).found == ("default",)
    names = ["shared.weight", "encoder.block.0.x", "decoder.block.0.x", "lm_head.weight"]
    assert [Modules(names).of(name) for name in names] == ["shared", "encoder", "decoder", "decoder"]
    whisper = ["model.encoder.conv1.weight", "model.decoder.layers.0.x", "proj_out.weight"]
    assert [Modules(whisper).of(name) for name in whisper] == ["encoder", "decoder", "decoder"]
    assert Modules(["bert.encoder.layer.0.x", "bert.pooler.dense.weight"]).found == ("default",)
