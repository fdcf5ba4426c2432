"""tokenizer_source and tokenizer: rows in the order of the output's vocabulary."""

from __future__ import annotations

import dataclasses
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import vocabularies
from tokenizers import Tokenizer
from vocabularies import TEXTS, give, ids_of, linear, rows_of, run, train, with_template

from merge import build_plan, parse_recipe
from merge.engine.memory import budget, predicted_peak
from merge.errors import UsageError
from merge.plan import Plan, Stored

pair = vocabularies.pair  # fixture

Make = Callable[..., Path]
TENSORS = ("model.embed_tokens.weight", "lm_head.weight")


@pytest.mark.parametrize("name", TENSORS)
def test_union_keeps_every_models_own_rows(tmp_path: Path, pair: tuple[Path, Path], name: str) -> None:
    a, b = pair
    out = run(linear(a, b, weights=(0.25, 0.75), more="tokenizer_source: union"), tmp_path / "out")
    ids, first, second = ids_of(out), ids_of(a), ids_of(b)
    rows, ours, theirs = rows_of(out, name), rows_of(a, name), rows_of(b, name)
    assert set(ids) == set(first) | set(second)
    assert len(rows) == len(ids) == max(ids.values()) + 1
    assert {token: ids[token] for token in first} == first  # the first model's numbers stay
    assert {"<tab>", "<end>", "<wave>"} <= set(ids)
    for token, number in ids.items():
        if token in first and token in second:
            expected = np.float32(0.25 * np.float64(ours[first[token]]) + 0.75 * np.float64(theirs[second[token]]))
        else:  # one of them lacks it and takes the other's row
            expected = ours[first[token]] if token in first else theirs[second[token]]
        np.testing.assert_array_equal(rows[number], expected, err_msg=token)
    assert json.loads((out / "config.json").read_text())["vocab_size"] == len(ids)


def test_a_united_tokenizer_works(tmp_path: Path, pair: tuple[Path, Path]) -> None:
    from transformers import AutoTokenizer

    a, b = pair
    out = run(linear(a, b, more="tokenizer_source: union"), tmp_path / "out")
    united = Tokenizer.from_file(str(out / "tokenizer.json"))
    loaded = AutoTokenizer.from_pretrained(out)
    for text in (*TEXTS.values(), "<s>über <wave>\n\t<tab> ends<end><both>", "日本 🙂 def sea"):
        found = united.encode(text)
        assert united.decode(found.ids, skip_special_tokens=False) == text
        assert loaded(text)["input_ids"] == found.ids
    ids = ids_of(out)
    assert ids == loaded.get_vocab()
    text = "<s>the ship<wave><end>"
    pieces = united.encode(text).tokens
    assert pieces[0] == "<s>"
    assert pieces[-2:] == ["<wave>", "<end>"]
    assert united.decode(united.encode(text).ids) == "the ship<wave>"  # special ones stay special
    # What the second model says in one token is one token still.
    word = next(t for t in ids_of(b) if t not in ids_of(a) and t.startswith("Ġ") and len(t) > 4 and t[1:].isalpha())
    assert len(united.encode(word.replace("Ġ", " ")).ids) <= len(
        Tokenizer.from_file(str(a / "tokenizer.json")).encode(word.replace("Ġ", " ")).ids
    )


@pytest.mark.parametrize("kind", ["unigram", "wordpiece"])
def test_union_of_other_kinds(tmp_path: Path, make_model: Make, kind: str) -> None:
    a = give(make_model, tmp_path / "a", train(kind, "sea", added=["<wave>"]), seed=1)
    b = give(make_model, tmp_path / "b", train(kind, "code", added=["<tab>"]), seed=2)
    out = run(linear(a, b, more="tokenizer_source: union"), tmp_path / "out")
    ids, first, second = ids_of(out), ids_of(a), ids_of(b)
    assert set(ids) == set(first) | set(second)
    assert {token: ids[token] for token in first} == first
    rows, theirs = rows_of(out), rows_of(b)
    for token in set(second) - set(first):
        np.testing.assert_array_equal(rows[ids[token]], theirs[second[token]])
    united = Tokenizer.from_file(str(out / "tokenizer.json"))
    ours = Tokenizer.from_file(str(a / "tokenizer.json"))
    text = "the ship <wave> sails <tab>"
    assert united.decode(united.encode(text).ids).replace(" ", "") == text.replace(" ", "")
    assert ours.encode(TEXTS["code"]).ids.count(0) > united.encode(TEXTS["code"]).ids.count(0) == 0  # no unknowns


def test_base_takes_only_the_bases_tokens(tmp_path: Path, pair: tuple[Path, Path]) -> None:
    a, b = pair
    more = f"base_model: {b}\ntokenizer_source: base"
    out = run(linear(a, b, more=more), tmp_path / "out")
    assert (out / "tokenizer.json").read_bytes() == (b / "tokenizer.json").read_bytes()
    first, second, rows = ids_of(a), ids_of(b), rows_of(out)
    ours, theirs = rows_of(a), rows_of(b)
    assert rows.shape == theirs.shape
    for token, number in second.items():
        mine = ours[first[token]] if token in first else theirs[number]
        np.testing.assert_array_equal(
            rows[number], np.float32((np.float64(mine) + np.float64(theirs[number])) / 2), err_msg=token
        )


def test_a_token_that_is_missing_takes_the_bases_row_else_the_mean(tmp_path: Path, make_model: Make) -> None:
    tokenizers = [train("bytes", "sea", added=added) for added in (["<x>", "<y>"], ["<x>", "<y>"], ["<x>"], [])]
    paths = [give(make_model, tmp_path / f"m{i}", t, seed=i) for i, t in enumerate(tokenizers)]
    with_base = run(
        linear(*paths, weights=(0, 0, 0, 1), more=f"base_model: {paths[0]}\ntokenizer_source: base"), tmp_path / "1"
    )
    numbers, base = ids_of(paths[0]), rows_of(paths[0])
    np.testing.assert_array_equal(rows_of(with_base)[numbers["<x>"]], base[numbers["<x>"]])
    without = run(linear(*paths[1:], weights=(0, 0, 1), more="tokenizer_source: union"), tmp_path / "2")
    both = [rows_of(path)[ids_of(path)["<x>"]].astype(np.float64) for path in paths[1:3]]
    np.testing.assert_array_equal(rows_of(without)[ids_of(without)["<x>"]], np.float32(sum(both) / 2))
    np.testing.assert_array_equal(rows_of(without)[ids_of(without)["<y>"]], rows_of(paths[1])[ids_of(paths[1])["<y>"]])


def test_tokens_say_where_rows_come_from(tmp_path: Path, pair: tuple[Path, Path]) -> None:
    a, b = pair
    more = f"""
tokenizer:
  source: union
  tokens:
    <tab>: {{source: {{kind: zero}}}}
    <wave>: {{source: {{kind: model_token, model: {b}, token: <end>}}}}
    <both>: {{source: {b}, force: true}}
    <new>: {{source: {{kind: model_token, model: {a}, token_id: 7}}}}
    <s>: {{source: {{kind: zero}}}}
  pad_to_multiple_of: 64
"""
    out = run(linear(a, b, weights=(0.5, 0.5), more=more), tmp_path / "out")
    ids, rows, ours, theirs = ids_of(out), rows_of(out), rows_of(a), rows_of(b)
    first, second = ids_of(a), ids_of(b)
    np.testing.assert_array_equal(rows[ids["<tab>"]], theirs[second["<tab>"]] / 2)  # the other half is zero
    expected = (np.float64(ours[first["<wave>"]]) + np.float64(theirs[second["<end>"]])) / 2
    np.testing.assert_array_equal(rows[ids["<wave>"]], np.float32(expected))
    np.testing.assert_array_equal(rows[ids["<both>"]], theirs[second["<both>"]])
    np.testing.assert_array_equal(rows[ids["<new>"]], ours[7])
    np.testing.assert_array_equal(rows[ids["<s>"]], ours[first["<s>"]] / 2)
    assert len(rows) % 64 == 0
    assert len(ids) < len(rows) < len(ids) + 64
    np.testing.assert_allclose(rows[len(ids)], rows[: len(ids)].mean(axis=0), atol=1e-6)
    assert (rows[len(ids) :] == rows[-1]).all()
    assert Tokenizer.from_file(str(out / "tokenizer.json")).encode("a<new>b").tokens == ["a", "<new>", "b"]


def test_padding_rows_are_kept(tmp_path: Path, make_model: Make) -> None:
    a = give(make_model, tmp_path / "a", train("bytes", "sea"), seed=1, padding=20)
    b = give(make_model, tmp_path / "b", train("bytes", "sea", added=["<x>"]), seed=2)
    plan = linear(a, b, weights=(1, 1), more=f"base_model: {a}\ntokenizer_source: base")
    out = run(plan, tmp_path / "out")
    rows, ours, theirs = rows_of(out), rows_of(a), rows_of(b)
    n = len(theirs) - 1
    assert len(rows) == len(ours) == n + 20
    np.testing.assert_array_equal(rows[:n], np.float32((np.float64(ours[:n]) + np.float64(theirs[:n])) / 2))
    np.testing.assert_array_equal(rows[n:], ours[n:])  # row n is <x> in b, so not b's row there
    same = linear(a, a, more="tokenizer_source: union")  # nothing is new: the tokenizer is one model's own
    assert {step.shape for step in same.steps if step.name in TENSORS} == {(n + 20, 8)}
    assert all(isinstance(ref, Stored) for step in same.steps for ref in step.inputs)


def test_tokenizer_of_a_model_that_is_not_merged(tmp_path: Path, pair: tuple[Path, Path]) -> None:
    a, b = pair
    bare = tmp_path / "bare"
    bare.mkdir()
    train("bytes", "sea", added=["<wave>", "<never>"]).save(str(bare / "tokenizer.json"))
    (a / "generation_config.json").write_text(json.dumps({"eos_token_id": [ids_of(a)["<wave>"]], "temperature": 0.5}))
    config = json.loads((a / "config.json").read_text()) | {"eos_token_id": ids_of(a)["<both>"], "pad_token_id": None}
    (a / "config.json").write_text(json.dumps(config))
    plan = linear(a, b, weights=(1, 0), more=f"tokenizer_source: {bare}")
    assert any("no model has '<never>'" in note for note in plan.notes)
    assert any("eos_token_id" in note and "null" in note for note in plan.notes)
    out = run(plan, tmp_path / "out")
    ids, rows, ours = ids_of(bare), rows_of(out), rows_of(a)
    assert ids_of(out) == ids
    assert len(rows) == len(ids)
    np.testing.assert_array_equal(rows[ids["<wave>"]], ours[ids_of(a)["<wave>"]])
    assert not rows[ids["<never>"]].any()
    generation = json.loads((out / "generation_config.json").read_text())
    assert generation == {"eos_token_id": [ids["<wave>"]], "temperature": 0.5}
    assert json.loads((out / "config.json").read_text())["eos_token_id"] is None


def test_pure_rearrangement_is_exact_to_the_bit(tmp_path: Path, make_model: Make) -> None:
    """From one model, float16 with subnormals, whatever the blocks and threads; and again after a change of order."""
    tokenizer = train("bytes", "sea", added=["<x>", "<y>"])
    a = give(make_model, tmp_path / "a", tokenizer, seed=3, dtype="F16")
    data = json.loads((a / "tokenizer.json").read_text())
    vocab = data["model"]["vocab"]
    order = dict(zip(vocab, np.random.default_rng(0).permutation(len(vocab)).tolist(), strict=True))
    bare = tmp_path / "bare"
    bare.mkdir()
    data["model"]["vocab"] = order
    (bare / "tokenizer.json").write_text(json.dumps(data))
    text = f"merge_method: passthrough\nmodels: [{{model: {a}}}]\ntokenizer_source: {bare}\n"
    plan = build_plan(parse_recipe(text))
    outs = [run(plan, tmp_path / f"out{i}", threads=i, block_chunks=i) for i in (1, 3)]
    assert (outs[0] / "model.safetensors").read_bytes() == (outs[1] / "model.safetensors").read_bytes()
    for name in TENSORS:
        found, stored = rows_of(outs[0], name), rows_of(a, name)
        for token, number in ids_of(bare).items():
            np.testing.assert_array_equal(
                found[number].view(np.uint16), stored[ids_of(a)[token]].view(np.uint16), err_msg=token
            )
        if name == TENSORS[0]:
            assert not np.array_equal(found, stored)


def test_the_plan_survives_json_and_a_tied_head_is_arranged_too(tmp_path: Path, make_model: Make) -> None:
    a = give(make_model, tmp_path / "a", train("bytes", "sea"), seed=1, tied=True)
    b = give(make_model, tmp_path / "b", train("bytes", "code"), seed=2)
    plan = linear(a, b, weights=(1, 1), more="tokenizer_source: union")
    assert Plan.from_json(plan.to_json()) == plan
    out = run(plan, tmp_path / "out")
    ids, ours, head = ids_of(out), rows_of(a), rows_of(b, "lm_head.weight")
    token = next(iter(set(ids_of(b)) & set(ids_of(a))))
    expected = (np.float64(ours[ids_of(a)[token]]) + np.float64(head[ids_of(b)[token]])) / 2
    np.testing.assert_array_equal(rows_of(out, "lm_head.weight")[ids[token]], np.float32(expected))


def test_task_vectors_of_missing_tokens_are_zero(tmp_path: Path, pair: tuple[Path, Path]) -> None:
    a, b = pair
    text = f"""merge_method: ties
base_model: {a}
models: [{{model: {b}, parameters: {{weight: 1, density: 0.5}}}}]
tokenizer_source: base
allow: [unrelated_base]
"""
    out = run(build_plan(parse_recipe(text)), tmp_path / "out")
    first, second = ids_of(a), ids_of(b)
    alone = [number for token, number in first.items() if token not in second]
    shared = [number for token, number in first.items() if token in second]
    assert len(alone) > 10
    np.testing.assert_array_equal(rows_of(out)[alone], rows_of(a)[alone])
    assert not np.array_equal(rows_of(out)[shared], rows_of(a)[shared])


def test_slices_take_rows_from_models_outside_the_slice_last(tmp_path: Path, pair: tuple[Path, Path]) -> None:
    a, b = pair
    text = f"""merge_method: passthrough
slices:
  - sources: [{{model: {a}, layer_range: [0, 1]}}]
  - sources: [{{model: {b}, layer_range: [0, 1]}}]
tokenizer_source: union
"""
    out = run(build_plan(parse_recipe(text)), tmp_path / "out")
    ids = ids_of(out)
    for token, number in ids.items():
        embedding_of = a if token in ids_of(a) else b
        head_of = b if token in ids_of(b) else a
        np.testing.assert_array_equal(rows_of(out)[number], rows_of(embedding_of)[ids_of(embedding_of)[token]])
        np.testing.assert_array_equal(
            rows_of(out, TENSORS[1])[number], rows_of(head_of, TENSORS[1])[ids_of(head_of)[token]]
        )


def test_a_heads_bias_follows(tmp_path: Path, make_model: Make) -> None:
    paths = []
    for i, text in enumerate(("sea", "code")):
        tokenizer = train("bytes", text)
        path = give(make_model, tmp_path / text, tokenizer, seed=i)
        n = tokenizer.get_vocab_size()
        random = np.random.default_rng(i)
        extra = {name: rows_of(path, name) for name in TENSORS}
        extra["lm_head.bias"] = random.standard_normal(n).astype(np.float32)
        extra["final_logits_bias"] = random.standard_normal((1, n)).astype(np.float32)
        make_model(path, seed=i, hidden=8, layers=1, extra=extra)
        tokenizer.save(str(path / "tokenizer.json"))
        paths.append(path)
    out = run(linear(*paths, weights=(0, 1), more="tokenizer_source: union"), tmp_path / "out")
    ids, theirs = ids_of(out), ids_of(paths[1])
    assert rows_of(out, "final_logits_bias").shape == (1, len(ids))
    for token, number in theirs.items():
        assert rows_of(out, "lm_head.bias")[ids[token]] == rows_of(paths[1], "lm_head.bias")[number]
        assert rows_of(out, "final_logits_bias")[0, ids[token]] == rows_of(paths[1], "final_logits_bias")[0, number]


def test_stale_files_are_left_out_and_special_tokens_agree(tmp_path: Path, make_model: Make) -> None:
    from transformers import AutoTokenizer

    ours = with_template(train("unigram", "sea", special=["<pad>"]))
    decoder = {"0": {"content": "<unk>", "special": True}, "1": {"content": "<s>", "special": True}}
    config = {
        "tokenizer_class": "LlamaTokenizer",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
        "pad_token": "<pad>",
        "added_tokens_decoder": decoder,
        "additional_special_tokens": ["<pad>"],
    }
    a = give(make_model, tmp_path / "a", ours, seed=1, config=config)
    (a / "tokenizer.model").write_bytes(b"\x0a\x00")
    (a / "special_tokens_map.json").write_text(json.dumps({"bos_token": "<s>", "pad_token": "<pad>"}))
    b = give(make_model, tmp_path / "b", train("unigram", "code", special=["<call>"]), seed=2)
    plan = linear(a, b, more="tokenizer_source: union")
    assert any("tokenizer.model" in note and "left out" in note for note in plan.notes)
    out = run(plan, tmp_path / "out")
    assert not (out / "tokenizer.model").exists()
    ids = ids_of(out)
    written = json.loads((out / "tokenizer_config.json").read_text())
    listed = {entry["content"]: int(number) for number, entry in written["added_tokens_decoder"].items()}
    assert listed["<call>"] == ids["<call>"]
    assert listed["<pad>"] == ids_of(a)["<pad>"]
    assert written["additional_special_tokens"] == ["<pad>", "<call>"]
    loaded = AutoTokenizer.from_pretrained(out)
    assert loaded.get_vocab() == ids
    assert loaded("the ship<call>")["input_ids"][0] == ids["<s>"] == loaded.bos_token_id
    assert loaded.decode(loaded("the ship<call>")["input_ids"], skip_special_tokens=True) == "the ship"


# --- memory --------------------------------------------------------------------------------------------------------


def test_the_plan_counts_the_tokenizers_that_are_read_for_it(pair: tuple[Path, Path]) -> None:
    a, b = pair
    alone, twice = (linear(a, other, more="tokenizer_source: base") for other in (a, b))
    assert 0 < alone.tokenizers_held < twice.tokenizers_held
    united = linear(a, b, more="tokenizer_source: union")
    assert twice.tokenizers_held < united.tokenizers_held < united.tokenizers_peak
    assert linear(a, a).tokenizers_peak == 0
    assert linear(a, b, more="allow: [shape_mismatch]").tokenizers_peak > 0  # compared, and noted
    large = dataclasses.replace(united, tokenizers_held=1 << 30, tokenizers_peak=3 << 30)
    assert predicted_peak(large, 1, 1) > 3 << 30
    with pytest.raises(UsageError, match="is too little"):
        budget(large, 1, 1 << 30)


@pytest.mark.full
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads peak memory from /proc")
def test_a_union_of_large_vocabularies_stays_within_the_plan_s_memory(
    tmp_path: Path, make_model: Make, run_cli: Callable[..., Any]
) -> None:
    n = 60_000
    for seed in (1, 2):
        tokenizer = json.loads(train("bytes", "sea").to_str())
        vocab, merges = tokenizer["model"]["vocab"], tokenizer["model"]["merges"]
        drawn, words = random.Random(seed), list(vocab)
        while len(vocab) < n:
            left, right = drawn.choice(words), drawn.choice(words)
            if len(left + right) < 14 and left + right not in vocab:
                vocab[left + right] = len(vocab)
                words.append(left + right)
                merges.append([left, right])
        rows = np.zeros((n, 8), np.float32)
        names = ("model.embed_tokens.weight", "lm_head.weight")
        path = make_model(tmp_path / str(seed), hidden=8, layers=1, extra=dict.fromkeys(names, rows))
        (path / "tokenizer.json").write_text(json.dumps(tokenizer), encoding="utf-8")
    models = "[{model: ./1}, {model: ./2}]"
    recipe = f"merge_method: linear\nmodels: {models}\nparameters: {{weight: 1}}\ntokenizer_source: union\n"
    (tmp_path / "r.yaml").write_text(recipe)
    run_cli(["run", "r.yaml", "-o", "out"], cwd=tmp_path)  # compiles kernels
    most = json.loads(run_cli(["plan", "r.yaml", "--json"], cwd=tmp_path).stdout)["peak_memory"]
    done = run_cli(["run", "r.yaml", "-o", "out", "--force", "--json"], cwd=tmp_path)
    assert json.loads(done.stdout)["peak_memory"] <= most
