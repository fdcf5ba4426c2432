"""merge perplexity: streamed numbers are those of the whole model in memory."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from adapter_files import make_adapter
from click.testing import CliRunner
from conftest import VOCABULARY
from tiny_models import model_of, sizes

from merge import build_plan, load_recipe, run_plan
from merge.cli import cli
from merge.errors import NumbersError, UsageError
from merge.layerwise import HiddenStates
from merge.tools.perplexity import _estimate, cut, measure


@pytest.fixture
def text(tmp_path: Path) -> Path:
    random = np.random.default_rng(1)
    path = tmp_path / "text.txt"
    path.write_text(" ".join(f"w{i}" for i in random.integers(1, VOCABULARY, 90)), encoding="utf-8")
    return path


def llama(path: Path, tied: bool = False) -> Path:
    from transformers import LlamaConfig

    return model_of(path, LlamaConfig(**sizes(tied)))


def whole(path: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()


def direct(path: Path, text: Path, context: int, stride: int) -> tuple[float, torch.Tensor]:
    """Mean loss and the log-probabilities of the scored positions, a window at a time, by transformers alone."""
    model, tokens = whole(path), [int(word[1:]) for word in text.read_text().split()]
    seen, losses, tables = 1, [], []
    for start in range(0, len(tokens), stride):
        window = tokens[start : start + context]
        with torch.no_grad():
            table = torch.log_softmax(model(torch.tensor([window])).logits[0].double(), -1)
        for place in range(max(1, seen - start), len(window)):
            losses.append(-float(table[place - 1, window[place]]))
            tables.append(table[place - 1])
        seen = max(seen, start + len(window))
        if start + context >= len(tokens):
            break
    return sum(losses) / len(losses), torch.stack(tables)


@pytest.mark.parametrize(
    ("kind", "tied"),
    [
        ("LlamaConfig", False),
        ("LlamaConfig", True),
        ("Gemma2Config", True),  # scaled embeddings, soft-capped logits
        ("PhiConfig", False),  # a head with a bias
        ("CohereConfig", True),  # scaled logits
        ("GraniteConfig", False),
    ],
)
def test_streamed_perplexity_is_that_of_the_whole_model(
    tmp_path: Path, text: Path, kind: str, tied: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    import transformers

    from merge.tools import perplexity

    monkeypatch.setattr(perplexity, "BLOCK_ROWS", 7)  # several blocks of the vocabulary, the last one shorter
    monkeypatch.setattr(perplexity, "BATCH_TOKENS", 32)
    settings = sizes(tied)
    if kind == "GraniteConfig":
        settings |= {"logits_scaling": 3.0, "embedding_multiplier": 2.0}
    if kind == "PhiConfig":
        settings.pop("head_dim")
    model = model_of(tmp_path / "model", getattr(transformers, kind)(**settings))
    said: list[str] = []
    found, _, _ = measure(model, text, context=16, say=said.append)
    expected, _ = direct(model, text, 16, 16)
    assert not said
    assert found.nll.value == pytest.approx(expected, abs=1e-5)
    assert found.perplexity.value == pytest.approx(math.exp(expected), rel=1e-5)
    assert (found.windows, found.tokens) == (6, 84)


def test_overlapping_windows_score_every_token_once(tmp_path: Path, text: Path) -> None:
    model = llama(tmp_path / "model")
    found, _, _ = measure(model, text, context=20, stride=6)
    expected, tables = direct(model, text, 20, 6)
    assert found.tokens == len(tables) == 89
    assert found.nll.value == pytest.approx(expected, abs=1e-5)


def test_hidden_states_on_the_disk_give_the_same_numbers(tmp_path: Path, text: Path) -> None:
    model = llama(tmp_path / "model")
    assert measure(model, text, context=16, budget=0) == measure(model, text, context=16)
    with HiddenStates(24) as states:
        for number in range(2):
            states.put(number, torch.full((2, 3), float(number)))
        states.put(1, torch.full((2, 3), 5.0))
        assert states.spilled
        assert [states.get(number).tolist() for number in range(2)] == [[[0.0] * 3] * 2, [[5.0] * 3] * 2]


def test_distance_is_that_of_the_distributions(tmp_path: Path, text: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from merge.tools import perplexity

    monkeypatch.setattr(perplexity, "BLOCK_ROWS", 5)
    model, other = llama(tmp_path / "a"), llama(tmp_path / "b", tied=True)
    own, its, distance = measure(model, text, against=other, context=16)
    (loss, p), (its_loss, q) = direct(model, text, 16, 16), direct(other, text, 16, 16)
    assert its is not None
    assert distance is not None
    assert own.nll.value == pytest.approx(loss, abs=1e-5)
    assert its.nll.value == pytest.approx(its_loss, abs=1e-5)
    assert distance.kl.value == pytest.approx(float((q.exp() * (q - p)).sum(-1).mean()), rel=1e-4)
    assert distance.top1.value == pytest.approx(float((p.argmax(-1) == q.argmax(-1)).double().mean()))
    assert 0 < distance.top1.value < 1
    _, _, none = measure(model, text, against=model, context=16)
    assert none is not None
    assert (none.kl.value, none.top1.value) == (pytest.approx(0, abs=1e-9), 1.0)


def test_a_model_that_cannot_be_streamed_is_held_whole_and_says_so_before(
    tmp_path: Path, text: Path, monkeypatch: pytest.MonkeyPatch, call_cli: Callable[..., Any]
) -> None:
    from transformers import LlamaModel

    forward = LlamaModel.forward

    def halved(self: Any, *arguments: Any, **keywords: Any) -> Any:
        """Changes what goes from the first layer into the second."""
        hook = self.layers[1].register_forward_pre_hook(lambda _, inputs: (inputs[0] / 2, *inputs[1:]))
        try:
            return forward(self, *arguments, **keywords)
        finally:
            hook.remove()

    monkeypatch.setattr(LlamaModel, "forward", halved)
    model = llama(tmp_path / "model")
    size = sum(4 * parameter.numel() for parameter in whole(model).parameters())
    said: list[str] = []
    found, _, _ = measure(model, text, context=16, say=said.append, max_ram=size)
    assert said == [
        f"{model}: the whole model has to be in memory, {size / 1e9:.3g} GB: "
        "it changes the hidden state between its layers."
    ]
    assert found.nll.value == pytest.approx(direct(model, text, 16, 16)[0], abs=1e-5)
    done = call_cli(["perplexity", model, "--data", text, "--max-ram", str(size - 1)])
    assert done.code == 2
    assert "--max-ram is" in done.stderr


def test_windows() -> None:
    (only,) = cut([list(range(5))], 8, 8)
    assert only.tokens.tolist() == [[0, 1, 2, 3, 4]]
    assert only.scored.tolist() == [[True] * 4]
    first, last = cut([list(range(5))], 4, 2)
    assert (first.tokens.tolist(), last.tokens.tolist()) == ([[0, 1, 2, 3]], [[2, 3, 4]])
    assert last.scored.tolist() == [[False, True]]
    assert cut([[1], []], 4, 4) == []
    (only,) = cut([list(range(5))], 4, 4)  # a window of one token has none to predict
    assert only.tokens.tolist() == [[0, 1, 2, 3]]


def test_standard_error_is_that_of_a_ratio() -> None:
    found = _estimate(np.array([2.0, 4.0]), np.array([2, 2]))
    assert (found.value, found.error) == (1.5, pytest.approx(0.5))
    assert _estimate(np.array([2.0]), np.array([2])).error is None


def test_bad_inputs(tmp_path: Path, text: Path, make_model: Callable[..., Path]) -> None:
    model = make_model(tmp_path / "model")
    empty = tmp_path / "empty.txt"
    empty.write_text("w1", encoding="utf-8")
    broken = tmp_path / "broken.jsonl"
    broken.write_text('{"text": "w1 w2"}\n{"txt": 3}\n', encoding="utf-8")
    nan = make_model(tmp_path / "nan", extra={"model.norm.weight": np.full(16, np.nan, np.float32)})
    layer = {"model.layers.0.input_layernorm.weight": np.full(16, np.nan, np.float32)}
    nan_inside = make_model(tmp_path / "inside", extra=layer)
    with pytest.raises(UsageError, match="no text of at least two tokens"):
        measure(model, empty)
    with pytest.raises(UsageError, match=r"broken\.jsonl:2"):
        measure(model, broken)
    with pytest.raises(UsageError, match="at most 64 tokens"):
        measure(model, text, context=65)
    with pytest.raises(UsageError, match="more than the context"):
        measure(model, text, context=8, stride=9)
    with pytest.raises(NumbersError, match="NaN"):
        measure(nan, text)
    with pytest.raises(NumbersError, match="NaN"):
        measure(nan_inside, text)


def test_the_command(tmp_path: Path, text: Path, make_model: Callable[..., Path], call_cli: Callable[..., Any]) -> None:
    base = make_model(tmp_path / "base")
    make_model(tmp_path / "other", base=base, delta=0.05)
    (tmp_path / "recipe.yaml").write_text(
        "merge_method: linear\nmodels: [{model: base}, {model: other}]\nparameters: {weight: 0.5}\n",
        encoding="utf-8",
    )
    done = call_cli(["perplexity", "recipe.yaml", "--data", text, "--against", "base", "--context", "30", "--json"])
    assert (done.code, done.stderr) == (0, "")
    found = json.loads(done.stdout)
    assert found["model"]["tokens"] == 87
    assert found["kl"]["value"] > 0
    assert found["against"]["perplexity"]["value"] == pytest.approx(
        measure(base, text, context=30)[0].perplexity.value, rel=1e-9
    )
    plain = call_cli(["perplexity", "base", "--data", text])
    assert plain.code == 0
    assert "perplexity" in plain.stdout


@pytest.mark.filterwarnings("ignore")  # what transformers and peft warn of is not ours
def test_merged_on_the_fly_is_as_merged_to_the_disk(
    tmp_path: Path, text: Path, make_model: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """model+adapter and a recipe, each as the model and as what it is held against."""
    base = make_model(tmp_path / "base")
    make_model(tmp_path / "other", base=base, delta=0.05)
    make_adapter(tmp_path / "lora", base)
    (tmp_path / "mean.yaml").write_text(
        "merge_method: linear\nmodels: [{model: base}, {model: other}]\nparameters: {weight: 1}\n", encoding="utf-8"
    )
    (tmp_path / "fold.yaml").write_text("merge_method: passthrough\nmodels: [{model: base+lora}]\n", encoding="utf-8")
    for name in ("mean", "fold"):
        run_plan(build_plan(load_recipe(tmp_path / f"{name}.yaml")), tmp_path / name)

    monkeypatch.chdir(tmp_path)

    def figures(model: str, against: str) -> dict[str, Any]:
        words = ["perplexity", model, "--against", against, "--data", str(text), "--context", "30", "--json", "--quiet"]
        done = CliRunner().invoke(cli, words, catch_exceptions=False)
        found: dict[str, Any] = json.loads(done.stdout)
        for each in (found["model"], found["against"], found):
            each.pop("name", None), each.pop("seconds", None)
        return found

    assert figures("base+lora", "mean.yaml") == figures("fold", "mean")
    assert figures("mean.yaml", "base+lora") == figures("mean", "fold")
    assert figures("base+lora", "base")["kl"]["value"] > 1e-6
