"""Tokenizers that cannot be united, and tokens and rows that do not fit: what is said."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import vocabularies
from vocabularies import give, ids_of, linear, rows_of, run, train

from merge.errors import CheckpointError, RecipeError

pair = vocabularies.pair  # fixture

Make = Callable[..., Path]
TENSORS = ("model.embed_tokens.weight", "lm_head.weight")


def refusal(*models: Path, more: str) -> str:
    with pytest.raises(RecipeError) as caught:
        linear(*models, more=more)
    return str(caught.value)


def test_families_do_not_mix(tmp_path: Path, make_model: Make, pair: tuple[Path, Path]) -> None:
    c = give(make_model, tmp_path / "c", train("unigram", "sea"), seed=3)
    said = refusal(pair[0], c, more="tokenizer_source: union")
    assert "byte-level BPE" in said
    assert "SentencePiece Unigram" in said
    assert "merge transplant" in said


def test_bad_tokens_are_told_together(pair: tuple[Path, Path]) -> None:
    a, b = pair
    more = f"""
tokenizer:
  source: union
  tokens:
    <nobody>: {{}}
    <x>: {{source: {a}}}
    <y>: {{source: {{kind: model_token, model: {b}, token: <wave>}}}}
    <z>: {{source: {{kind: model_token, model: {b}, token_id: 9999}}}}
    <w>: {{source: org/other}}
"""
    said = refusal(a, b, more=more)
    assert "no model has the token '<nobody>'" in said
    assert f"{a} has no token '<x>'" in said
    assert f"{b} has no token '<wave>'" in said
    assert "no row 9,999" in said
    assert '"org/other", which is not merged' in said
    assert said.count("\n") == 4


def test_models_without_a_tokenizer(tmp_path: Path, make_model: Make, pair: tuple[Path, Path]) -> None:
    a, b = pair
    rows = len(rows_of(a))
    alike = give(make_model, tmp_path / "c", None, seed=3, rows=rows)
    plan = linear(a, alike, more="tokenizer_source: base")
    assert any("taken to be in" in note for note in plan.notes)
    other = give(make_model, tmp_path / "d", None, seed=3, rows=rows + 1)
    assert "its tokens are unknown" in refusal(a, other, more="tokenizer_source: union")
    assert "no model has tokenizer files" in refusal(alike, other, more="tokenizer_source: union")
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(CheckpointError, match="has no tokenizer"):
        linear(a, b, more=f"tokenizer_source: {empty}")
    (b / "tokenizer.json").write_text("{")
    with pytest.raises(CheckpointError, match="not valid JSON"):
        linear(a, b, more="tokenizer_source: union")


def test_more_tokens_than_rows(tmp_path: Path, make_model: Make) -> None:
    tokenizer = train("bytes", "sea", added=["<x>", "<y>"])
    n = tokenizer.get_vocab_size()
    short = give(make_model, tmp_path / "a", tokenizer, seed=1, rows=n - 1)
    whole = give(make_model, tmp_path / "b", tokenizer, seed=2)
    plan = linear(short, short, more="tokenizer_source: base")
    assert any("left out: '<y>'" in note for note in plan.notes)
    out = run(plan, tmp_path / "out")
    assert "<y>" not in ids_of(out)
    assert len(rows_of(out)) == n - 1
    both = run(linear(short, whole, weights=(1, 0), more="tokenizer_source: base"), tmp_path / "both")
    np.testing.assert_array_equal(rows_of(both)[n - 1], rows_of(whole)[n - 1])
    far = give(make_model, tmp_path / "c", tokenizer, seed=1, rows=n - 10)
    assert "do not belong together" in refusal(far, far, more="tokenizer_source: base")


def test_rows_of_another_width(tmp_path: Path, make_model: Make, pair: tuple[Path, Path]) -> None:
    wide = give(make_model, tmp_path / "w", train("bytes", "code"), seed=3, hidden=16)
    said = refusal(pair[0], wide, more="tokenizer_source: union")
    assert "differ in size: hidden_size 16 and 8" in said


def test_float64_rows_are_refused(tmp_path: Path, make_model: Make, pair: tuple[Path, Path]) -> None:
    wide = give(make_model, tmp_path / "w", train("bytes", "code"), seed=3)
    extra = {name: rows_of(wide, name).astype(np.float64) for name in TENSORS}
    make_model(wide, seed=3, hidden=8, layers=1, extra=extra)
    train("bytes", "code").save(str(wide / "tokenizer.json"))
    assert "float64 rows cannot be arranged" in refusal(pair[0], wide, more="tokenizer_source: union")


def test_without_a_tokenizer_source_the_message_names_it(pair: tuple[Path, Path]) -> None:
    assert "tokenizer_source: union" in refusal(*pair, more="")
