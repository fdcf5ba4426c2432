"""merge statistics: what it writes is what hooks on the whole model give, after a stop too."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from architectures import build
from conftest import VOCABULARY
from safetensors.numpy import load_file
from tiny_models import model_of, sizes, write_tokenizer

from merge.errors import CheckpointError, UsageError
from merge.layerwise import LayerRunner, Unstreamable
from merge.recipe import parse_reference
from merge.statistics import StatisticsSummary, collect_statistics
from merge.statistics.parts import Parts

Arrays = dict[str, npt.NDArray[np.float32]]


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    from transformers import LlamaConfig

    return model_of(tmp_path / "tiny", LlamaConfig(**sizes()))


@pytest.fixture
def data(tmp_path: Path) -> Path:
    random = np.random.default_rng(0)
    lengths = [7, 12, 12, 3, 30, 12, 1]
    texts = [" ".join(f"w{i}" for i in random.integers(1, VOCABULARY, length)) for length in lengths]
    path = tmp_path / "data.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    return path


def collect(model: Path, data: Path, out: Path, **options: Any) -> StatisticsSummary:
    return collect_statistics(parse_reference(str(model)), data, out, **({"length": 12, "batch": 2} | options))


def sequences(data: Path) -> list[list[int]]:
    """What `data` is as token numbers at a length of 12, in any order."""
    texts = [json.loads(line)["text"] for line in data.read_text().splitlines()]
    numbers = [[int(word[1:]) for word in text.split()] for text in texts]
    pieces = [text[start : start + 12] for text in numbers for start in range(0, len(text), 12)]
    return [piece for piece in pieces if len(piece) > 1]


def direct_grams(path: Path, data: Path) -> Arrays:
    """Hooks on every linear layer of the whole model, a sequence at a time."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    tied = {name for name in ("lm_head",) if model.config.tie_word_embeddings}
    sums: dict[str, torch.Tensor] = {}
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and name not in tied:
            key = f"gram.{name}.weight"

            def add(module: Any, inputs: Any, output: Any, key: str = key) -> None:
                flat = inputs[0].reshape(-1, inputs[0].shape[-1]).double()
                sums[key] = sums.get(key, 0) + flat.T @ flat

            module.register_forward_hook(add)
    with torch.no_grad():
        for sequence in sequences(data):
            model(torch.tensor([sequence]))
    return {name: total.float().numpy() for name, total in sums.items()}


def assert_near(got: Arrays, expected: Arrays) -> None:
    assert sorted(got) == sorted(expected)
    for name, values in expected.items():
        assert got[name].dtype == np.float32
        np.testing.assert_allclose(got[name], values, rtol=1e-4, atol=1e-5 * np.abs(values).max(), err_msg=name)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("kind", ["LlamaConfig", "Gemma2Config", "Qwen3Config"])
def test_layer_by_layer_equals_hooks_on_the_whole_model(tmp_path: Path, data: Path, kind: str, tied: bool) -> None:
    import transformers

    own = {"sliding_window": 4, "query_pre_attn_scalar": 8} if kind == "Gemma2Config" else {}
    path = model_of(tmp_path / "model", getattr(transformers, kind)(**sizes(tied), **own))
    summary = collect(path, data, tmp_path / "out.safetensors")
    assert summary.notes == ()
    assert summary.tokens == sum(map(len, sequences(data)))
    assert_near(load_file(tmp_path / "out.safetensors"), direct_grams(path, data))
    assert not (tmp_path / "out.safetensors.partial").exists()


@pytest.mark.parametrize("name", ["opt", "falcon", "mixtral"])
def test_what_is_outside_the_layers_or_renamed_has_its_statistics(tmp_path: Path, data: Path, name: str) -> None:
    """OPT projects its embeddings, Falcon's layers give tuples, Mixtral's experts are stacked in memory."""
    path = tmp_path / "model"
    build(name).save_pretrained(path)
    write_tokenizer(path)
    assert collect(path, data, tmp_path / "out.safetensors").notes == ()
    found, expected = load_file(tmp_path / "out.safetensors"), direct_grams(path, data)
    assert_near(found, expected)
    assert name != "opt" or "gram.model.decoder.project_in.weight" in found


def test_a_model_without_linear_layers_has_no_statistics_for_regmean(tmp_path: Path, data: Path) -> None:
    build("gpt2").save_pretrained(tmp_path / "model")
    write_tokenizer(tmp_path / "model")
    with pytest.raises(CheckpointError, match="has no linear layers whose inputs"):
        collect(tmp_path / "model", data, tmp_path / "out.safetensors")


def test_a_model_that_cannot_be_streamed_is_held_whole_with_a_note(
    tmp_path: Path, tiny: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def cannot(runner: LayerRunner) -> None:
        raise Unstreamable("of the moon")

    monkeypatch.setattr("merge.layerwise.opening.check_end", cannot)
    said: list[str] = []
    summary = collect(tiny, data, tmp_path / "out.safetensors", say=said.append)
    assert summary.notes == tuple(said)
    assert said[0].endswith("GB: of the moon.")
    assert_near(load_file(tmp_path / "out.safetensors"), direct_grams(tiny, data))
    with pytest.raises(UsageError, match="--max-ram"):
        collect(tiny, data, tmp_path / "other.safetensors", max_ram=1000)
    with pytest.raises(UsageError, match="Fisher information needs the whole model"):
        collect(tiny, data, tmp_path / "other.safetensors", kind="fisher", max_ram=1000)


@pytest.mark.parametrize("stop", [0, 1, 2, 3])
def test_a_run_that_was_stopped_goes_on_to_the_same_bytes(
    tmp_path: Path, tiny: Path, data: Path, monkeypatch: pytest.MonkeyPatch, stop: int
) -> None:
    collect(tiny, data, tmp_path / "whole.safetensors")
    save, out = Parts.save, tmp_path / "out.safetensors"

    def killed(parts: Parts, name: str, tensors: Any) -> None:
        if len(list(parts.directory.glob("gram-*.safetensors"))) == stop:
            parts.path(name + ".new").write_bytes(b"half")
            raise KeyboardInterrupt
        save(parts, name, tensors)

    with monkeypatch.context() as patch:
        patch.setattr(Parts, "save", killed)
        with pytest.raises(KeyboardInterrupt):
            collect(tiny, data, out)
    assert not out.exists()
    with pytest.raises(UsageError, match="unfinished work of another run"):
        collect(tiny, data, out, seed=1)
    assert collect(tiny, data, out).resumed_parts == stop
    assert out.read_bytes() == (tmp_path / "whole.safetensors").read_bytes()


def test_fisher_is_the_mean_of_squared_gradients_of_each_sequence(tmp_path: Path, tiny: Path, data: Path) -> None:
    from transformers import AutoModelForCausalLM

    collect(tiny, data, tmp_path / "out.safetensors", kind="both")
    got = load_file(tmp_path / "out.safetensors")
    model = AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32)
    expected = {name: torch.zeros(p.shape, dtype=torch.float64) for name, p in model.named_parameters()}
    for sequence in sequences(data):
        model.zero_grad()
        tokens = torch.tensor([sequence])
        (-model(tokens, labels=tokens).loss * (len(sequence) - 1)).backward()
        for name, parameter in model.named_parameters():
            expected[name] += parameter.grad.double() ** 2 / len(sequences(data))
    own = {name: value for name, value in got.items() if name.startswith("fisher.")}
    assert_near(own, {f"fisher.{name}": value.float().numpy() for name, value in expected.items()})
    assert any(name.startswith("gram.") for name in got)


def test_max_tokens_and_seed_choose_the_texts(tmp_path: Path, tiny: Path, data: Path) -> None:
    assert collect(tiny, data, tmp_path / "a", max_tokens=20).tokens <= 20
    collect(tiny, data, tmp_path / "b", max_tokens=20)
    collect(tiny, data, tmp_path / "c", max_tokens=20, seed=5)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    assert (tmp_path / "a").read_bytes() != (tmp_path / "c").read_bytes()


def test_a_line_that_is_no_text_is_named(tmp_path: Path, tiny: Path) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_text('{"text": "w1 w2"}\n{"texts": 1}\n')
    with pytest.raises(UsageError, match=r'bad\.jsonl:2: expected an object with a "text"'):
        collect(tiny, path, tmp_path / "out")


def test_the_command(tmp_path: Path, tiny: Path, data: Path, call_cli: Callable[..., Any]) -> None:
    out = tmp_path / "out.safetensors"
    command = ["statistics", tiny, "--data", data, "-o", out, "--json"]
    code, stdout, stderr = call_cli([*command, "--kind", "both"])
    assert (code, stderr) == (0, "")
    assert json.loads(stdout)["tensors"] == 3 * 7 + 1 + 3 * 9 + 3
    code, stdout, stderr = call_cli(command)
    (problem,) = json.loads(stdout)["problems"]
    assert code == 2
    assert "exists; nothing was changed" in problem["message"]
    assert problem["message"] in stderr
    assert call_cli(["statistics", tmp_path / "nowhere", "--data", data, "-o", out])[0] == 2
