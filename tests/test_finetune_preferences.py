"""Preferences: DPO and KTO by hand, the reference model, label smoothing, conversations."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import objectives
import pytest
import torch
from objectives import Ready, Run
from tiny_llama import write_lines

from finetune.data.pack import BatchRow

place, ready, run = objectives.place, objectives.ready, objectives.run  # fixtures


def test_dpo_starts_at_log_2_and_compares_answers_alone(run: Run, ready: Ready, tmp_path: Path) -> None:
    report = run(data="choices", train="lora", learning_rate=1e-2)
    assert report.losses["validation_before"] == pytest.approx(math.log(2), abs=1e-6)
    assert report.metrics["reward_margin"][0] == 0
    assert report.metrics["reward_accuracy"][0] == 0.5
    file = write_lines(tmp_path / "d.jsonl", [{"prompt": "ab=", "chosen": "AB", "rejected": "c"}])
    example = ready(data=file).data.train.examples[0]
    assert [weights.tolist() for _, weights in example.sequences] == [[0, 0, 0, 1, 1, 1], [0, 0, 0, 1, 1]]


@pytest.mark.parametrize("train", ["lora", "bottleneck", "prompt"])
def test_the_reference_is_the_model_without_its_adapter(ready: Ready, place: Path, train: str) -> None:
    """Rewards of a moved adapter, against log-probabilities computed here by hand."""
    from finetune.models import load_model
    from finetune.trainables import make_trainable
    from merge.loading.libraries import quiet_libraries

    prepared = ready(data="choices", train=train)
    base = load_model(prepared.base, prepared.config, "AutoModelForCausalLM", "cpu").eval()
    model = load_model(prepared.base, prepared.config, "AutoModelForCausalLM", "cpu")
    with quiet_libraries():
        model = make_trainable(model, prepared.config, "CAUSAL_LM", []).eval()
    torch.manual_seed(1)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.1 * torch.randn_like(parameter)
    prepared.objective.begin(model, prepared.data, prepared.config, "cpu")
    rows = [prepared.data.train[i] for i in range(3)]
    with torch.no_grad():
        losses, rewards = prepared.objective.measure(model, prepared.objective.collate(rows, 0))

    def log_p(net: Any, ids: Any, weights: Any) -> float:
        ids = torch.from_numpy(ids).long()[None]
        with torch.no_grad():
            found = net(ids).logits[:, -ids.shape[1] :].log_softmax(-1)[0, :-1]
        picked = found.gather(1, ids[0, 1:, None])[:, 0]
        return float((picked * torch.from_numpy(weights[1:])).sum())

    for row, loss, reward in zip(rows, losses, rewards, strict=True):
        pair = row.examples[0][1].sequences
        wanted = [0.1 * (log_p(model, *one) - log_p(base, *one)) for one in pair]
        assert reward.tolist() == pytest.approx(wanted, abs=1e-4)
        assert any(abs(value) > 1e-3 for value in wanted)
        assert float(loss) == pytest.approx(math.log(1 + math.exp(wanted[1] - wanted[0])), abs=1e-4)


def test_kto_by_hand(ready: Ready) -> None:
    """Losses of wanted and unwanted answers, from log-probabilities that are known."""

    class Fixed:
        """Every token has probability 1/V."""

        def __call__(self, input_ids: Any, **_: Any) -> Any:
            return type("Out", (), {"logits": torch.zeros(*input_ids.shape, 8)})()

    prepared = ready(data="judged", beta=0.5, wanted_weight=2.0, unwanted_weight=3.0)
    examples = [prepared.data.train.examples[i] for i in range(6)]
    small = [type(one)(one.ids % 8, one.weights, one.place, starts=one.starts, label=one.label) for one in examples]
    assert {one.label for one in small} == {0, 1}
    batch = prepared.objective.collate([BatchRow([(i, one)], False) for i, one in enumerate(small)], 0)
    batch["reference"] = torch.tensor([[-30.0 - i, -40.0] for i in range(6)])  # the answer's, the foreign one's
    lengths = [[float(weights.sum()) for _, weights in one.sequences] for one in small]
    rewards = [0.5 * (-math.log(8) * own + 30.0 + i) for i, (own, _) in enumerate(lengths)]
    z = sum(0.5 * (-math.log(8) * foreign + 40.0) for _, foreign in lengths) / 6
    assert z > 0
    expected = [
        2.0 / (1 + math.exp(r - z)) if one.label else 3.0 / (1 + math.exp(z - r))
        for one, r in zip(small, rewards, strict=True)
    ]
    assert prepared.objective.loss(Fixed(), batch).tolist() == pytest.approx(expected, rel=1e-3)
    batch["reference"][:, 1] = 0.0  # foreign answers have lost: z is not below 0
    at_zero = prepared.objective.loss(Fixed(), batch)[0]
    weight, sign = (2.0, 1) if small[0].label else (3.0, -1)
    assert float(at_zero) == pytest.approx(weight / (1 + math.exp(sign * rewards[0])), rel=1e-3)


def test_label_smoothing(ready: Ready) -> None:
    class Fixed:
        """A model whose rewards are known: the reference is zero, log p of an answer its length times log 1/V."""

        def __call__(self, input_ids: Any, **_: Any) -> Any:
            return type("Out", (), {"logits": torch.zeros(*input_ids.shape, 8)})()

    prepared = ready(data="choices", label_smoothing=0.2, beta=0.5)
    example = prepared.data.train.examples[0]
    small = type(example)(example.ids % 8, example.weights, example.place, starts=example.starts)
    batch = prepared.objective.collate([BatchRow([(0, small)], False)], 0)
    counts = [weights.sum() for _, weights in small.sequences]
    margin = 0.5 * math.log(8) * float(counts[1] - counts[0])
    wanted = 0.8 * math.log1p(math.exp(-margin)) + 0.2 * math.log1p(math.exp(margin))
    assert float(prepared.objective.loss(Fixed(), batch)) == pytest.approx(wanted, rel=1e-5)


def test_conversations_are_compared_by_their_last_turn(ready: Ready, tmp_path: Path) -> None:
    start = [{"role": "user", "content": "ab"}]
    rows = [{"chosen": [*start, answer("C")], "rejected": [*start, answer("dd")]}]
    prepared = ready(data=write_lines(tmp_path / "d.jsonl", rows))
    tokenizer = prepared.base.tokenizer
    found = [tokenizer.decode(ids[weights > 0]) for ids, weights in prepared.data.train.examples[0].sequences]
    assert found == ["C<end>", "dd<end>"]


def answer(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}
