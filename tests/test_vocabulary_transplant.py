"""merge transplant: one model's tokenizer for another's embeddings."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer
from vocabularies import TEXTS, give, ids_of, rows_of, train

from merge import verify_output
from merge.tools.transplant import omp
from merge.vocabulary.surface import same_tokens, surface, surfaces
from merge.vocabulary.tokenizer import read_tokenizer

Make = Callable[..., Path]
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


def textbook(target: np.ndarray, atoms: np.ndarray, k: int) -> tuple[list[int], np.ndarray]:
    """Orthogonal matching pursuit as it is defined, one target in float64."""
    chosen: list[int] = []
    left = target.astype(np.float64)
    coefficients = np.zeros(0)
    for _ in range(k):
        scores = np.abs(atoms.astype(np.float64) @ left)
        scores[chosen] = -1
        chosen.append(int(scores.argmax()))
        coefficients = np.linalg.lstsq(atoms[chosen].astype(np.float64).T, target.astype(np.float64), rcond=None)[0]
        left = target - atoms[chosen].astype(np.float64).T @ coefficients
    return chosen, coefficients


def test_matching_pursuit_is_the_textbooks() -> None:
    random = np.random.default_rng(0)
    atoms = random.standard_normal((200, 24)).astype(np.float32)
    targets = random.standard_normal((17, 24)).astype(np.float32)
    chosen, coefficients = omp.match(targets, atoms, 6)
    for i, target in enumerate(targets):
        expected, factors = textbook(target, atoms, 6)
        assert chosen[i].tolist() == expected
        np.testing.assert_allclose(coefficients[i], factors, rtol=1e-6, atol=1e-9)


def test_matching_pursuit_finds_a_sparse_combination() -> None:
    """Orthonormal atoms: exact; and atoms that are there twice do no harm."""
    atoms = np.eye(16, dtype=np.float32)
    target = np.zeros((1, 16), np.float32)
    target[0, [3, 7]] = [2, -5]
    chosen, coefficients = omp.match(target, np.concatenate([atoms, atoms]), 4)
    rows = np.random.default_rng(0).standard_normal((32, 5)).astype(np.float32)
    assert {3, 7} <= {int(i) % 16 for i in chosen[0]}
    assert set(np.flatnonzero(np.abs(coefficients[0]) > 1e-6).tolist()) == {0, 1}
    np.testing.assert_allclose(
        omp.combine(chosen[:, :2], coefficients[:, :2], rows)[0], -5 * rows[7] + 2 * rows[3], rtol=1e-5
    )


def test_tokens_of_different_families_are_told_to_be_the_same(tmp_path: Path, make_model: Make) -> None:
    kinds = ("bytes", "unigram", "wordpiece")
    tokenizers = {}
    for kind in kinds:
        path = give(make_model, tmp_path / kind, train(kind, "sea", size=80, special=["<call>"]), seed=1)
        tokenizers[kind] = read_tokenizer(str(path), kind)
    for first in kinds:
        for second in kinds:
            ours, theirs = tokenizers[first], tokenizers[second]
            matched = same_tokens(ours, theirs)
            assert matched[theirs.vocabulary["<call>"]] == ours.vocabulary["<call>"]
            texts, other_texts = surfaces(ours), surfaces(theirs)
            assert all(texts[b] == other_texts[a] for a, b in matched.items() if a in other_texts)
            found = {other_texts[a] for a in matched if a in other_texts}
            assert b"s" in found
            assert any(text.startswith(b" ") and len(text) > 1 for text in found)
    assert surface("Ġthe", "bytes") == surface("▁the", "metaspace") == surface("the", "##") == b" the"
    assert surface("<0x0A>", "metaspace") == surface("Ċ", "bytes") == b"\n"
    assert surface("##s", "##") == surface("s", "bytes") == b"s"
    assert surface("Ã¼", "bytes") == "ü".encode()


@pytest.fixture
def pair(tmp_path: Path, make_model: Make) -> tuple[Path, Path]:
    """A model with a byte-level BPE, and a donor of another width with another one, tied and padded."""
    model = give(make_model, tmp_path / "model", train("bytes", "sea", special=["<s>"]), seed=1)
    theirs = train("bytes", "code", added=["<tab>"], special=["<end>"])
    config = {"eos_token": "<end>"}
    donor = give(make_model, tmp_path / "donor", theirs, seed=2, hidden=16, tied=True, padding=5, config=config)
    settings = json.loads((model / "config.json").read_text()) | {"eos_token_id": ids_of(model)["<s>"]}
    (model / "config.json").write_text(json.dumps(settings))
    return model, donor


def transplant(call_cli: Callable[..., Any], *arguments: str | Path, code: int = 0) -> Any:
    found = call_cli(["transplant", *arguments])
    assert found.code == code, found.stderr
    return found


def test_shared_tokens_are_copied_and_new_ones_combined(
    tmp_path: Path, pair: tuple[Path, Path], call_cli: Callable[..., Any]
) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model, donor = pair
    told = transplant(call_cli, model, donor, "-o", tmp_path / "out", "--k", "8", "--json", "--threads", "2")
    facts = json.loads(told.stdout)
    ours, theirs = ids_of(model), ids_of(donor)
    shared = [token for token in theirs if token in ours]
    assert facts["shared"] == len(shared)
    assert facts["new"] == facts["combined"] == len(theirs) - len(shared)
    out = tmp_path / "out"
    assert not verify_output(out).problems
    assert (out / "tokenizer.json").read_bytes() == (donor / "tokenizer.json").read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["donor", "model", "out"]
    config = json.loads((out / "config.json").read_text())
    assert config["vocab_size"] == len(theirs) + 5
    assert config["eos_token_id"] == theirs["<end>"]  # <s> is not in the donor's; <end> has the role
    atoms_of = sorted(theirs[token] for token in shared)
    by_id = {number: token for token, number in theirs.items()}
    atoms = rows_of(donor)[atoms_of]
    for name in (EMBEDDING, HEAD):  # the donor's head is its embedding
        rows, old = rows_of(out, name), rows_of(model, name)
        for token in shared:
            np.testing.assert_array_equal(rows[theirs[token]], old[ours[token]])
        errors = []
        for token in (token for token in theirs if token not in ours):
            target = rows_of(donor)[theirs[token]]
            chosen, factors = textbook(target, atoms, 8)
            expected = factors @ old[[ours[by_id[atoms_of[i]]] for i in chosen]].astype(np.float64)
            np.testing.assert_allclose(rows[theirs[token]], expected, rtol=1e-4, atol=1e-5)
            errors.append(np.linalg.norm(target - factors @ atoms[chosen]) / np.linalg.norm(target))
        assert abs(facts["residuals"][name] - np.mean(errors)) < 1e-4
        np.testing.assert_allclose(rows[len(theirs) :], np.tile(rows[: len(theirs)].mean(axis=0), (5, 1)), atol=1e-6)
    loaded = AutoModelForCausalLM.from_pretrained(out)
    tokens = AutoTokenizer.from_pretrained(out)("def merge(first<tab>", return_tensors="pt")
    assert loaded(**tokens).logits.isfinite().all()


def test_the_same_bytes_from_any_threads_and_after_a_kill(
    tmp_path: Path, pair: tuple[Path, Path], call_cli: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    from merge.recipe import parse_reference
    from merge.tools.transplant import plan as work
    from merge.tools.transplant import rows as new_rows

    monkeypatch.setattr(omp, "_SCORES", 1200)  # several batches
    job = work.prepare(parse_reference(str(pair[0])), parse_reference(str(pair[1])), k=4)
    assert len(job.combined) > 3 * omp.batch_size(len(job.shared))
    seen: list[int] = []
    for threads in (1, 3):
        file = new_rows.make_rows(job, tmp_path / f"{threads}.safetensors", threads, progress=seen.append)
        assert file is not None
    assert (tmp_path / "1.safetensors").read_bytes() == (tmp_path / "3.safetensors").read_bytes()
    assert max(seen) == job.bytes_combined
    before = (tmp_path / "1.safetensors").stat().st_mtime_ns
    residuals = dict(job.residuals)
    job.residuals.clear()
    assert new_rows.make_rows(job, tmp_path / "1.safetensors") is not None  # found, not computed again
    assert (tmp_path / "1.safetensors").stat().st_mtime_ns == before
    assert job.residuals == pytest.approx(residuals, abs=1e-6)
    other = work.prepare(parse_reference(str(pair[0])), parse_reference(str(pair[1])), k=5)
    new_rows.make_rows(other, tmp_path / "1.safetensors")
    assert (tmp_path / "1.safetensors").read_bytes() != (tmp_path / "3.safetensors").read_bytes()


@pytest.mark.parametrize("method", ["mean", "zero", "copy-only"])
def test_other_methods(tmp_path: Path, pair: tuple[Path, Path], call_cli: Callable[..., Any], method: str) -> None:
    model, donor = pair
    transplant(call_cli, model, donor, "-o", tmp_path / "out", "--method", method)
    ours, theirs = ids_of(model), ids_of(donor)
    rows, old = rows_of(tmp_path / "out"), rows_of(model)
    copied = [theirs[token] for token in theirs if token in ours]
    token = next(token for token in theirs if token not in ours and token.startswith("Ġ") and len(token) > 3)
    pieces = Tokenizer.from_file(str(model / "tokenizer.json")).encode(token.replace("Ġ", " ")).ids
    assert len(pieces) > 1
    everything = rows[[number for number in theirs.values() if method != "copy-only" or number in copied]]
    expected = {
        "mean": old[pieces].astype(np.float64).mean(axis=0),
        "zero": np.zeros(8),
        "copy-only": everything.astype(np.float64).mean(axis=0),
    }[method]
    np.testing.assert_allclose(rows[theirs[token]], expected, atol=1e-6)
    np.testing.assert_array_equal(rows[copied], old[[ours[token] for token in theirs if token in ours]])


def test_a_tokenizer_alone_and_another_family(
    tmp_path: Path, pair: tuple[Path, Path], call_cli: Callable[..., Any]
) -> None:
    bare = tmp_path / "bare"
    bare.mkdir()
    train("unigram", "sea", special=["<s>"]).save(str(bare / "tokenizer.json"))
    told = transplant(call_cli, pair[0], bare, "-o", tmp_path / "no", code=1)
    assert "no weights" in told.stderr
    assert "--method mean" in told.stderr
    transplant(call_cli, pair[0], bare, "-o", tmp_path / "out", "--method", "mean")
    rows, old = rows_of(tmp_path / "out"), rows_of(pair[0])
    tokenizers = [read_tokenizer(str(path), path.name) for path in (pair[0], bare)]
    matched = same_tokens(*tokenizers)
    words = [number for number, text in surfaces(tokenizers[1]).items() if number in matched and text[:1] == b" "]
    assert words
    np.testing.assert_array_equal(rows[words], old[[matched[number] for number in words]])
    np.testing.assert_array_equal(rows[ids_of(bare)["<s>"]], old[ids_of(pair[0])["<s>"]])
    text = TEXTS["sea"].strip()
    united = Tokenizer.from_file(str(tmp_path / "out" / "tokenizer.json"))
    assert united.decode(united.encode(text).ids) == text


def test_refusals(tmp_path: Path, pair: tuple[Path, Path], call_cli: Callable[..., Any]) -> None:
    model, donor = pair
    out = tmp_path / "out"
    told = transplant(call_cli, model, donor, "-o", out, "--k", "4000", code=2)
    assert "tokens only. Give a smaller --k" in told.stderr
    told = transplant(call_cli, model, donor, "-o", out, "--max-ram", "300MiB", code=2)
    assert "omp holds the rows of shared tokens" in told.stderr
    assert transplant(call_cli, model, tmp_path / "nowhere", "-o", out, code=2).stderr.startswith("merge: there is no")
    (donor / "tokenizer.json").unlink()
    assert "has no tokenizer" in transplant(call_cli, model, donor, "-o", out, code=1).stderr
    assert not out.exists()
    assert not list(tmp_path.glob("*.rows*"))
    assert "exists; nothing was changed" in transplant(call_cli, model, donor, "-o", model, code=2).stderr
