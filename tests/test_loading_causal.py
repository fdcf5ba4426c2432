"""Perplexity, statistics and continuations are of models that predict each token from those before it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from tiny_bert import make_tiny_bert
from tiny_llama import make_tiny_llama, write_lines

from merge.errors import CheckpointError
from merge.layerwise import whole_model
from merge.loading import check_causal, load_config

SAID = "is not a causal language model"


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_bert(tmp_path_factory.mktemp("models") / "bert")


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_llama(tmp_path_factory.mktemp("models") / "llama")


def with_config(model: Path, path: Path, **values: Any) -> Path:
    shutil.copytree(model, path)
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | values))
    return path


@pytest.mark.parametrize(
    "words",
    [
        ["perplexity", "MODEL", "--data", "text.jsonl"],
        ["statistics", "MODEL", "--data", "text.jsonl", "-o", "out"],
        ["statistics", "MODEL", "--data", "text.jsonl", "-o", "out", "--kind", "fisher"],
        ["generate", "MODEL", "--prompt", "ab"],
        ["eval", "MODEL", "--data", "text.jsonl", "--cache", "answers"],
    ],
)
@pytest.mark.parametrize("architecture", ["BertForMaskedLM", "BertModel"])
def test_verbs_refuse_a_model_that_sees_both_sides(
    bert: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: list[str], architecture: str
) -> None:
    from merge.cli import cli

    monkeypatch.chdir(tmp_path)
    with_config(bert, Path("bert"), architectures=[architecture])
    write_lines(Path("text.jsonl"), [{"text": "abc def"}] * 4)
    with pytest.raises(CheckpointError, match=SAID):
        cli([word if word != "MODEL" else "bert" for word in words], standalone_mode=False)
    assert not Path("out").exists()


def test_what_a_config_says_of_both_sides(bert: Path, llama: Path, tmp_path: Path) -> None:
    decoder = with_config(bert, tmp_path / "decoder", architectures=["BertLMHeadModel"], is_decoder=True)
    both = with_config(llama, tmp_path / "both", is_causal=False)
    for path, causal in {bert: False, decoder: True, llama: True, both: False}.items():
        config = load_config(str(path))
        if causal:
            check_causal(config, str(path))
        else:
            with pytest.raises(CheckpointError, match=SAID):
                check_causal(config, str(path))


def test_what_no_config_says_shows_when_the_model_runs(tmp_path: Path) -> None:
    import torch
    from transformers import XLNetConfig, XLNetLMHeadModel

    torch.manual_seed(0)
    settings = {"vocab_size": 32, "d_model": 16, "n_layer": 1, "n_head": 2, "d_inner": 16}
    XLNetLMHeadModel(XLNetConfig(**settings)).save_pretrained(tmp_path)  # type: ignore[arg-type]
    with pytest.raises(CheckpointError, match="its predictions depend on later tokens"):
        whole_model(str(tmp_path))


def test_causal_models_pass(llama: Path) -> None:
    whole_model(str(llama))
