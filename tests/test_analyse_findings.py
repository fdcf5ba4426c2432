"""merge analyse, what follows from the measures: findings, what deltas look like, suggestions, the recipe."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from analysed import analysis_of, base_tensors, low_rank, moved, noise, stored, write_model
from conftest import TOKENIZER

from merge import build_plan, run_plan
from merge.errors import CheckpointError, RecipeError, UsageError
from merge.planning.load import parse_recipe
from merge.tools.analyse import Analysis

BASE = base_tensors()


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return write_model(tmp_path / "base", BASE)


def found(analysis: Analysis, what: str) -> list[tuple[str, str]]:
    """(level, text) of the findings of one kind"""
    return [(each.level, each.text) for each in analysis.findings if each.what == what]


# Findings.


def test_models_without_differences_give_no_finding(base: Path, tmp_path: Path) -> None:
    a, b = (write_model(tmp_path / name, moved(BASE, noise(seed))) for seed, name in enumerate("ab", 1))
    assert analysis_of(base, a, b).findings == ()


@pytest.mark.parametrize(
    ("config", "what", "level", "words"),
    [
        ({"rope_theta": 5e5}, "rope", "problem", 'positions are {"rope_theta": 500000.0, "rope_type": "default"}'),
        (
            {"rope_scaling": {"type": "linear", "factor": 2.0}},
            "rope",
            "problem",
            '"factor": 2.0, "rope_theta": 10000.0',
        ),
        ({"rope_theta": "x", "rope_scaling": [2]}, "rope", "problem", 'positions are {"rope_theta": "x"'),
        ({"num_attention_heads": 4}, "architecture", "warning", "num_attention_heads is 4, the base's 2"),
        ({"architectures": ["MistralForCausalLM"]}, "architecture", "problem", "is MistralForCausalLM, the base Llama"),
    ],
)
def test_configs_are_compared(
    base: Path, tmp_path: Path, config: dict[str, Any], what: str, level: str, words: str
) -> None:
    a = write_model(tmp_path / "a", moved(BASE, noise(1)), config=config)
    ((said, text),) = found(analysis_of(base, a), what)
    assert said == level
    assert words in text


def test_configs_of_other_versions_say_the_same(base: Path, tmp_path: Path) -> None:
    new = {"rope_parameters": {"rope_theta": 10000.0, "rope_type": "default"}, "head_dim": 8, "attention_bias": False}
    a = write_model(tmp_path / "a", moved(BASE, noise(1)), config=new)
    b = write_model(tmp_path / "b", moved(BASE, noise(2)), config={"rope_theta": 10000, "rope_scaling": None})
    assert analysis_of(base, a, b).findings == ()


def test_tokenizers_are_compared(base: Path, tmp_path: Path) -> None:
    vocabulary = {token: i for token, i in TOKENIZER["model"]["vocab"].items() if token != "w31"} | {"new": 31}
    more = TOKENIZER | {
        "pre_tokenizer": {"type": "WhitespaceSplit"},
        "model": TOKENIZER["model"] | {"vocab": vocabulary},
    }
    a = write_model(tmp_path / "a", moved(BASE, noise(1)), tokenizer=more, tokenizer_config={"eos_token": "w1"})
    b = write_model(tmp_path / "b", moved(BASE, noise(2)), tokenizer_config={"chat_template": "{{ messages }}"})
    c = write_model(tmp_path / "c", moved(BASE, noise(3)), tokenizer=None)
    analysis = analysis_of(base, a, b, c)
    texts = [text.partition(": ")[2] for _, text in found(analysis, "tokenizer")]
    vocabularies = found(analysis, "vocabulary")
    assert vocabularies == [
        ("warning", f"{a}: has 1 tokens that the base lacks, lacks 1 of its, and has 0 under other numbers")
    ]
    assert texts == [
        "another pre_tokenizer than the base's",
        'eos_token is "w1", the base\'s not set',
        "cannot be compared, as only some of the models have a tokenizer",
    ]
    assert found(analysis, "chat template") == [("note", f"{b}: a chat template, the base has none")]


def test_a_damaged_tokenizer_is_a_finding(base: Path, tmp_path: Path) -> None:
    a = write_model(tmp_path / "a", moved(BASE, noise(1)), tokenizer={"model": {}})
    (broken, other) = found(analysis_of(base, a), "tokenizer")
    assert broken[0] == "problem"
    assert "tokenizer.json: model.vocab: expected tokens with their ids" in broken[1]
    assert other[0] == "note"


def test_ties_dtypes_and_tensors_are_compared(base: Path, tmp_path: Path) -> None:
    tensors = moved(BASE, noise(1))
    del tensors["lm_head.weight"]
    a = write_model(tmp_path / "a", tensors, "BF16", config={"tie_word_embeddings": True})
    analysis = analysis_of(base, a)
    ties = f"{a}: tie_word_embeddings is true, the base's false"
    assert found(analysis, "ties") == [("warning", ties)]
    assert found(analysis, "dtype") == [("note", f"{a}: is BF16, the base F32")]


def test_other_shapes_are_left_out_and_told(base: Path, tmp_path: Path) -> None:
    tensors = moved(BASE, noise(1))
    for name in ("lm_head.weight", "model.embed_tokens.weight"):
        tensors[name] = np.concatenate([tensors[name], tensors[name][:2]])
    a = write_model(tmp_path / "a", tensors)
    analysis = analysis_of(base, a)
    assert [name for name, _ in analysis.left_out] == ["model.embed_tokens.weight", "lm_head.weight"]
    ((level, text),) = found(analysis, "tensors")
    assert level == "warning"
    assert "other shapes than the base's ([34, 16] for [32, 16])" in text


def test_models_that_cannot_be_merged_are_found(base: Path, tmp_path: Path) -> None:
    a = write_model(tmp_path / "a", moved(BASE, noise(1)))
    again = write_model(tmp_path / "again", moved(BASE, noise(1)))
    empty = write_model(tmp_path / "empty", BASE)
    other = write_model(tmp_path / "other", base_tensors(seed=9))
    analysis = analysis_of(base, a, again, empty, other)
    assert found(analysis, "duplicate") == [("problem", f"{again}: every tensor is the same as in {a}")]
    assert found(analysis, "empty delta") == [("problem", f"{empty}: every tensor is the base's")]
    ((level, text),) = found(analysis, "base")
    assert level == "problem"
    assert f"{other}: is not a fine-tune of this base: cosine of weights" in text
    assert [each.text for each in analysis.suggestions if each.about == "model"] == [
        f"leave out {model}" for model in (again, empty, other)
    ]
    assert analysis.recipe is None  # one model is left


def test_far_tiny_and_equal_deltas_are_found(base: Path, tmp_path: Path) -> None:
    far = write_model(tmp_path / "far", moved(BASE, noise(1, 0.05)))
    tiny = write_model(tmp_path / "tiny", moved(BASE, noise(2, 2e-6)))
    analysis = analysis_of(base, far, tiny)
    assert [level for level, _ in found(analysis, "base")] in (["warning"], ["problem"])
    assert found(analysis, "tiny delta")[0][1].startswith(f"{tiny}: a tiny delta: |d|/|b| 4e-05")
    assert found(analysis, "rounding")[0][1].startswith(f"{tiny}: 9")
    twin = moved(moved(BASE, noise(1, 0.05)), noise(3, 1e-4))
    analysis = analysis_of(base, far, write_model(tmp_path / "twin", twin))
    ((level, text),) = found(analysis, "duplicate")
    assert level == "warning"
    assert text == f"{far} and {tmp_path / 'twin'}: almost the same delta (cosine 1.00000)"


# What deltas look like.


@pytest.mark.parametrize("dtype", ["F32", "BF16"])
def test_a_lora_is_recognised_with_its_rank_and_modules(tmp_path: Path, dtype: str) -> None:
    tensors = {name: stored(values, dtype) for name, values in base_tensors(hidden=64).items()}
    base = write_model(tmp_path / "base", tensors, dtype)
    tuned = moved(tensors, low_rank(1, 4, ("q_proj", "v_proj")))
    tuned["model.norm.weight"] += 0.25
    a = write_model(tmp_path / "a", tuned, dtype)
    (look,) = analysis_of(base, a).looks
    assert (look.kind, look.rank, look.modules, look.whole) == ("lora", 4, ("q_proj", "v_proj"), ("norm",))
    assert look.text == "LoRA of rank 4 on q_proj, v_proj, and norm"


def test_full_partial_and_empty_deltas_are_told_apart(tmp_path: Path) -> None:
    tensors = base_tensors(layers=4)
    base = write_model(tmp_path / "base", tensors)
    changes = {
        "full": lambda name: True,
        "upper": lambda name: "layers.2" in name or "layers.3" in name,
        "embeddings": lambda name: "embed" in name or "lm_head" in name,
        "norms": lambda name: "norm" in name,
        "none": lambda name: False,
    }
    models = []
    for name, is_changed in changes.items():
        random = np.random.default_rng(1)
        tuned = {
            key: values + is_changed(key) * np.float32(0.01) * random.standard_normal(values.shape).astype(np.float32)
            for key, values in tensors.items()
        }
        models.append(write_model(tmp_path / name, tuned))
    looks = analysis_of(base, *models).looks
    assert [look.kind for look in looks] == ["full", "full", "embeddings", "norms", "none"]
    assert [look.text for look in looks] == [
        "full",
        "full, but for embedding, head, in 2 of 4 layers (2-3)",
        "embedding and head only",
        "norms only",
        "nothing changed",
    ]
    assert looks[1].layers == (2, 3)


# Suggestions.


def suggested(analysis: Analysis) -> dict[str, str]:
    return {each.about: each.text for each in analysis.suggestions}


def test_deltas_that_point_the_same_way_are_averaged(base: Path, tmp_path: Path) -> None:
    common = moved(BASE, noise(1, 0.002))
    a, b = (write_model(tmp_path / name, moved(common, noise(seed))) for seed, name in enumerate("ab", 2))
    analysis = analysis_of(base, a, b)
    assert analysis.recipe is not None
    recipe = parse_recipe(analysis.recipe)
    assert (recipe.merge_method, dict(recipe.parameters)) == ("linear", {"weight": 0.5})


def test_shared_directions_call_for_tsv(tmp_path: Path) -> None:
    tensors = base_tensors(hidden=64)
    base = write_model(tmp_path / "base", tensors)
    random = np.random.default_rng(0)
    left = {name: random.standard_normal((values.shape[0], 4)) for name, values in tensors.items()}
    right = {name: random.standard_normal((4, values.shape[-1])) for name, values in tensors.items()}
    models = []
    for name in "ab":
        turn = random.standard_normal((4, 4))
        tuned = {
            key: (v + (0.01 * left[key] @ turn @ right[key] if v.ndim == 2 else 0)).astype(np.float32)
            for key, v in tensors.items()
        }
        models.append(write_model(tmp_path / name, tuned))
    analysis = analysis_of(base, *models)
    assert suggested(analysis)["method"] == "tsv"
    assert analysis.recipe is not None
    assert parse_recipe(analysis.recipe).merge_method == "tsv"


def test_loras_that_share_one_side_alone_need_no_tsv(tmp_path: Path) -> None:
    """Their A began with the same random numbers."""
    tensors = base_tensors(hidden=64)
    base = write_model(tmp_path / "base", tensors)
    models = []
    for seed, name in enumerate("ab", 1):
        random, same = np.random.default_rng(seed), np.random.default_rng(0)
        tuned = dict(tensors)
        for key, values in tensors.items():
            if values.ndim == 2:
                delta = random.standard_normal((len(values), 4)) @ same.standard_normal((4, values.shape[1]))
                tuned[key] = (values + 0.01 * delta).astype(np.float32)
        models.append(write_model(tmp_path / name, tuned))
    analysis = analysis_of(base, *models)
    whole = analysis.group()
    assert whole is not None
    assert whole.spectra.right == pytest.approx([1])
    assert suggested(analysis)["method"] == "task_arithmetic"


def test_deltas_whose_large_entries_agree_call_for_ties(base: Path, tmp_path: Path) -> None:
    """Each has a tenth of its entries in common with the other, ten times as large as its own."""
    random = np.random.default_rng(0)
    large = {n: 0.02 * random.standard_normal(v.shape) * (random.random(v.shape) < 0.1) for n, v in BASE.items()}
    models = []
    for name in "ab":
        flips = {n: np.where(random.random(v.shape) < 0.7, 1, -1) for n, v in BASE.items()}
        tuned = {n: v + flips[n] * large[n] + 0.002 * random.standard_normal(v.shape) for n, v in BASE.items()}
        models.append(write_model(tmp_path / name, {n: values.astype(np.float32) for n, values in tuned.items()}))
    analysis = analysis_of(base, *models, matrices=0)
    assert suggested(analysis)["method"] == "ties"
    assert suggested(analysis)["density"] == "density 0.1"


def test_deltas_without_relation_are_added_and_the_recipe_runs(base: Path, tmp_path: Path) -> None:
    models = [write_model(tmp_path / name, moved(BASE, noise(seed))) for seed, name in enumerate("abc", 1)]
    analysis = analysis_of(base, *models, matrices=0)
    assert suggested(analysis)["method"] == "task_arithmetic"
    assert suggested(analysis)["weight"] == "task_arithmetic with weight 0.58"  # 1 / sqrt(3)
    assert analysis.recipe is not None
    recipe = parse_recipe(analysis.recipe)
    assert recipe.dtype == "F32"
    run_plan(build_plan(recipe), tmp_path / "out", threads=1)
    assert (tmp_path / "out" / "model.safetensors").exists()


def test_layers_of_other_geometry_get_a_gradient(tmp_path: Path) -> None:
    """In the first half of the layers the deltas are equal, in the second orthogonal."""
    tensors = base_tensors(layers=10)
    base = write_model(tmp_path / "base", tensors)
    common = moved(tensors, noise(1))
    models = []
    for seed, name in enumerate("abcd", 2):
        own = moved(tensors, noise(seed))
        tuned = {n: common[n] if any(f"layers.{i}." in n for i in range(5)) else own[n] for n in tensors}
        models.append(write_model(tmp_path / name, tuned))
    analysis = analysis_of(base, *models, matrices=0)
    gradient = suggested(analysis)["gradient"]
    assert gradient.startswith("or weight [0.25, 0.25, ")
    assert [0.45 < float(knot) < 0.55 for knot in gradient.partition("[")[2].partition("]")[0].split(", ")][3:] == [
        True
    ] * 2


def test_models_that_undo_each_other_are_not_merged(base: Path, tmp_path: Path) -> None:
    change = noise(1)
    delta = {name: change(name, values.shape) for name, values in BASE.items()}
    a = write_model(tmp_path / "a", moved(BASE, lambda name, shape: delta[name]))
    b = write_model(tmp_path / "b", moved(BASE, lambda name, shape: -0.9 * delta[name]))
    c = write_model(tmp_path / "c", moved(BASE, noise(2)))
    analysis = analysis_of(base, a, b, c)
    assert suggested(analysis)["pair"] == f"{a} and {b} will not merge: they undo each other; take one of them"
    assert analysis.recipe is not None
    assert [source.model.text for source in parse_recipe(analysis.recipe).models] == [str(a), str(c)]


def test_small_deltas_ask_for_float32(tmp_path: Path) -> None:
    """Of an average in bfloat16 a quarter of each delta is lost where that is below half an ulp."""
    start = {name: stored(values, "BF16") for name, values in BASE.items()}
    base, common = write_model(tmp_path / "base", start, "BF16"), moved(start, noise(9, 1e-4))
    models = [
        write_model(tmp_path / name, moved(common, noise(seed, 1e-5)), "BF16") for seed, name in enumerate("abcd", 1)
    ]
    analysis = analysis_of(base, *models, matrices=0)
    assert suggested(analysis)["method"] == "linear: average the models"
    assert suggested(analysis)["dtype"] == "write float32"
    assert analysis.recipe is not None
    assert 'dtype: "float32"' in analysis.recipe


def test_a_long_delta_is_told(base: Path, tmp_path: Path) -> None:
    a = write_model(tmp_path / "a", moved(BASE, noise(1, 0.001)))
    b = write_model(tmp_path / "b", moved(BASE, noise(2, 0.003)))
    texts = [each.text for each in analysis_of(base, a, b, matrices=0).suggestions]
    assert f"{b} outweighs {a}: try a smaller weight for it" in texts


def test_other_vocabularies_are_united(base: Path, tmp_path: Path) -> None:
    vocabulary = {token: i for token, i in TOKENIZER["model"]["vocab"].items() if token != "w31"} | {"new": 31}
    other = TOKENIZER | {"model": TOKENIZER["model"] | {"vocab": vocabulary}}
    a = write_model(tmp_path / "a", moved(BASE, noise(1)))
    b = write_model(tmp_path / "b", moved(BASE, noise(2)), tokenizer=other)
    analysis = analysis_of(base, a, b, matrices=0)
    assert analysis.recipe is not None
    assert parse_recipe(analysis.recipe).tokenizer_source == "union"


def test_a_recipe_that_cannot_be_planned_is_not_suggested(base: Path, tmp_path: Path) -> None:
    tensors = moved(BASE, noise(2))
    del tensors["model.layers.1.mlp.up_proj.weight"]
    a, b = write_model(tmp_path / "a", moved(BASE, noise(1))), write_model(tmp_path / "b", tensors)
    analysis = analysis_of(base, a, b, matrices=0)
    assert analysis.recipe is None
    ((level, text),) = found(analysis, "recipe")
    assert level == "problem"
    assert "model.layers.1.mlp.up_proj.weight" in text


# Refusals.


def test_what_cannot_be_analysed_is_refused(base: Path, tmp_path: Path) -> None:
    a = write_model(tmp_path / "a", moved(BASE, noise(1)))
    with pytest.raises(UsageError, match="at least one fine-tune"):
        analysis_of(base)
    with pytest.raises(UsageError, match="is the base, and cannot be one of its fine-tunes"):
        analysis_of(base, a, base)
    with pytest.raises(UsageError, match="is named 2 times"):
        analysis_of(base, a, a)
    wide = write_model(tmp_path / "wide", base_tensors(hidden=24))
    with pytest.raises(RecipeError, match="differ in size: hidden_size 24 and 16"):
        analysis_of(base, wide)
    (tmp_path / "nothing").mkdir()
    with pytest.raises(CheckpointError, match="nothing"):
        analysis_of(base, tmp_path / "nothing")
