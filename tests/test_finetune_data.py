"""From files to batches: formats, templates, the loss mask to the letter, packing, mixing, and wrong data."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny_llama import make_tiny_llama, words, write_lines

from finetune.data import Data, encode_samples, read_samples
from finetune.data.pack import IGNORED, BatchRow, collate, make_rows
from finetune.data.tokenizer import set_up_tokenizer
from finetune.keys import Config, DataSource
from merge.errors import MergeError, UsageError


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_llama(tmp_path_factory.mktemp("tiny") / "model")


def tokenizer_of(model: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(model)


def load(model: Path, file: Path, context: int | None = 64, **keys: Any) -> Data:
    config = Config(model=str(model), data=(DataSource(str(file)),), out="o", **keys)
    tokenizer = tokenizer_of(model)
    set_up_tokenizer(tokenizer, config, None)
    return encode_samples(read_samples(config, None), config, tokenizer, context)


def shown(data: Data, model: Path, number: int = 0) -> list[tuple[str, float]]:
    """(text, weight) of runs of tokens."""
    example, tokenizer = data.train.examples[number], tokenizer_of(model)
    runs: list[tuple[str, float]] = []
    for token, weight in zip(example.ids, example.weights, strict=True):
        text, weight = tokenizer.decode([int(token)]), round(float(weight), 3)
        if runs and runs[-1][1] == weight:
            runs[-1] = (runs[-1][0] + text, weight)
        else:
            runs.append((text, weight))
    return runs


# ---- the loss mask


def test_prompt_counts_a_tenth_and_response_with_its_end_mark_one(model: Path, tmp_path: Path) -> None:
    file = write_lines(tmp_path / "d.jsonl", [{"prompt": "ab=", "completion": "CD"}])
    assert shown(load(model, file), model) == [("a", 0), ("b=", 0.1), ("CD<eos>", 1)]
    assert shown(load(model, file, prompt_loss_weight=0.0), model) == [("ab=", 0), ("CD<eos>", 1)]
    assert shown(load(model, file, prompt_loss_weight=1.0), model) == [("a", 0), ("b=CD<eos>", 1)]


CONVERSATION = [
    {"role": "user", "content": "ab"},
    {"role": "assistant", "content": "CD"},
    {"role": "user", "content": "e"},
    {"role": "assistant", "content": "F"},
]


def test_every_answer_of_a_conversation_counts_with_its_end_mark(model: Path, tmp_path: Path) -> None:
    file = write_lines(tmp_path / "d.jsonl", [{"messages": CONVERSATION}])
    assert shown(load(model, file, prompt_loss_weight=0.0), model) == [
        ("<user>ab<end><assistant>", 0),
        ("CD<end>", 1),
        ("<user>e<end><assistant>", 0),
        ("F<end>", 1),
    ]


def test_last_turn_only(model: Path, tmp_path: Path) -> None:
    file = write_lines(tmp_path / "d.jsonl", [{"messages": CONVERSATION}])
    assert shown(load(model, file, prompt_loss_weight=0.5, last_turn_only=True), model) == [
        ("<user>", 0),
        ("ab<end><assistant>CD<end><user>e<end><assistant>", 0.5),
        ("F<end>", 1),
    ]


def test_sharegpt_is_the_same_conversation(model: Path, tmp_path: Path) -> None:
    turns = [{"from": "human" if t["role"] == "user" else "gpt", "value": t["content"]} for t in CONVERSATION]
    one = load(model, write_lines(tmp_path / "a.jsonl", [{"messages": CONVERSATION}]))
    two = load(model, write_lines(tmp_path / "b.jsonl", [{"conversations": turns}]))
    assert (one.train.examples[0].ids == two.train.examples[0].ids).all()
    assert (one.train.examples[0].weights == two.train.examples[0].weights).all()


def test_pairs_go_into_the_chat_template_if_asked(model: Path, tmp_path: Path) -> None:
    file = write_lines(tmp_path / "d.jsonl", [{"prompt": "ab", "completion": "CD"}])
    assert shown(load(model, file, chat=True, prompt_loss_weight=0.0), model) == [
        ("<user>ab<end><assistant>", 0),
        ("CD<end>", 1),
    ]


def test_text_counts_whole_and_long_text_is_split(model: Path, tmp_path: Path) -> None:
    file = tmp_path / "d.txt"
    file.write_text("abcdefghij", encoding="utf-8")
    data = load(model, file, max_length=4)
    assert data.objective == "text"
    assert [shown(data, model, i) for i in range(3)] == [
        [("a", 0), ("bcd", 1)],
        [("e", 0), ("fgh", 1)],
        [("i", 0), ("j<eos>", 1)],
    ]


def test_a_token_across_the_border_counts_as_response(tmp_path: Path, model: Path) -> None:
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    from finetune.data.encode import Encoder

    bpe = models.BPE(vocab={"a": 0, " ": 1, "b": 2, " b": 3, "<e>": 4}, merges=[(" ", "b")])
    fast = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(bpe), eos_token="<e>")
    encoder = Encoder(fast, Config(), 10)
    ids, weights = encoder.pair("a ", "ba")
    assert ids.tolist() == [0, 3, 0, 4]
    assert weights.tolist() == [0, 1, 1, 1]
    assert encoder.straddling == 1
    assert encoder.pair("a", " ba")[1].tolist() == [0, 1, 1, 1]
    assert encoder.straddling == 1


# ---- packing


def test_packing_fills_rows_and_loses_nothing(model: Path, tmp_path: Path) -> None:
    data = load(model, write_lines(tmp_path / "d.jsonl", words(100)), packing=True, max_length=32)
    sizes = [sum(len(data.train.examples[i]) for i in row) for row in data.train.rows]
    assert sorted(i for row in data.train.rows for i in row) == list(range(100))
    assert max(sizes) <= 32
    assert sum(sizes) > 0.95 * 32 * (len(sizes) - 1)  # best fit leaves little room


def test_a_packed_batch_by_hand(model: Path, tmp_path: Path) -> None:
    rows = [{"prompt": "a=", "completion": "B"}, {"prompt": "c", "completion": "D"}]
    data = load(model, write_lines(tmp_path / "d.jsonl", rows), packing=True, max_length=9, prompt_loss_weight=0.5)
    a, equals, b, c, d = tokenizer_of(model)("a=BcD")["input_ids"]
    batch = {name: value.tolist() for name, value in collate([data.train[0]], pad=0).items() if name != "examples"}
    assert batch["input_ids"] == [[a, equals, b, 1, c, d, 1]]
    assert batch["position_ids"] == [[0, 1, 2, 3, 0, 1, 2]]
    assert batch["targets"] == [
        [equals, b, 1, IGNORED, d, 1, IGNORED]
    ]  # nobody predicts the next example's first token
    assert batch["weights"] == [[0.5, 1, 1, 0, 1, 1, 0]]
    assert "attention_mask" not in batch


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_packed_loss_equals_unpacked_loss(model: Path, tmp_path: Path, attention: str) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    from finetune.objectives import OBJECTIVES

    net = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float64, attn_implementation=attention).eval()
    file = write_lines(tmp_path / "d.jsonl", words(40))
    objective = OBJECTIVES["supervised"]
    sums = []
    with torch.no_grad():
        for packing in (True, False):
            train = load(model, file, packing=packing, max_length=40).train
            batch = objective.collate([train[i] for i in range(len(train))], 0)
            assert len(train) == (40 if not packing else len(train.rows))
            sums.append(float(objective.loss(net, batch).double().sum() / objective.weights(batch).double().sum()))
    assert sums[0] == pytest.approx(sums[1], rel=1e-6)


def test_padding_changes_no_loss(model: Path, tmp_path: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    from finetune.objectives import OBJECTIVES

    net = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float64).eval()
    train, objective = load(model, write_lines(tmp_path / "d.jsonl", words(8))).train, OBJECTIVES["supervised"]
    with torch.no_grad():
        together = objective.loss(net, objective.collate([train[i] for i in range(8)], 0))
        alone = torch.cat([objective.loss(net, objective.collate([train[i]], 0)) for i in range(8)])
    assert torch.allclose(together, alone, rtol=1e-6)


@pytest.mark.parametrize(
    ("rows", "keys", "message"),
    [
        ([{"foo": "a", "bar": "b"}], {}, "cannot tell the format from the columns foo, bar. Give templates"),
        (
            [{"prompt": "a", "completion": "b"}, {"prompt": "a"}],
            {},
            'd.jsonl:2: no column "completion"; found: prompt.',
        ),
        ([{"prompt": "a", "completion": None}], {}, 'd.jsonl:1: "completion" must be a string, found nothing.'),
        (
            [{"question": "a", "answer": "b"}],
            {"prompt": "{qestion}", "completion": "{answer}"},
            'prompt template: unknown field "{qestion}" in {place}:1; did you mean "question"?',
        ),
        ([{"question": "a"}], {"prompt": "{question", "completion": "x"}, "expected '}' before end of string"),
        ([{"text": "a"}], {"format": "alpaca"}, "format alpaca needs the columns instruction, output; found: text."),
        (
            [{"messages": [{"role": "user", "content": "a"}]}],
            {},
            '"messages" has no turn of the assistant that is learnt.',
        ),
        ([{"messages": [{"role": "boss", "content": "a"}]}], {}, '"messages", turn 1: unknown role "boss"'),
        (
            [{"prompt": "p", "chosen": "c", "rejected": "r"}],
            {"objective": "supervised"},
            "holds preference pairs; the objective supervised takes conversations or instructions or prompts",
        ),
        ([{"text": "a"}], {"objective": "supervised"}, "holds texts; the objective supervised takes conversations or"),
        (
            [{"prompt": "a" * 70, "completion": "B"}, {"prompt": "a", "completion": "B"}],
            {},
            "d.jsonl:1: 72 tokens, and a sequence may have 64; so 1 of 2 examples are too long. Raise max_length",
        ),
        (
            [{"prompt": "a" * 70, "completion": "B"}],
            {"too_long": "truncate"},
            "d.jsonl:1: no token of a response in 1 of 1 examples, so all of it is masked",
        ),
        ([{"prompt": "a" * 70, "completion": "B"}], {"too_long": "drop"}, "all 1 examples were dropped"),
        (
            [{"prompt": "a", "completion": "B"}],
            {"max_length": 65},
            "max_length: 65 is more than the model's context of 64",
        ),
        ([{"prompt": "a", "completion": "B"}], {"eos_token": "</s>"}, 'eos_token: "</s>" is not in the vocabulary'),
        (
            [{"prompt": "\ud83d", "completion": "B"}],
            {},
            "\"prompt\" has half of a surrogate pair, '\\ud83d'. Remove it.",
        ),
        (
            [{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "", "tool_calls": [1]}]}],
            {},
            'd.jsonl:1: "messages", turn 2: a tool call has "name" and "arguments"',
        ),
        (
            [{"prompt": "a", "completion": "B"}],
            {"prompt": "{prompt!r}", "completion": "B"},
            'prompt template "{prompt!r}": write {prompt} alone',
        ),
        (
            [{"prompt": "a", "completion": "B"}],
            {"train": "prompt", "virtual_tokens": 64},
            "virtual_tokens: 64 and sequences of 2 tokens are more than the model's context of 64",
        ),
        (
            [{"prompt": "a" * 46, "completion": "B"}],
            {"train": "ptuning"},
            "d.jsonl:1: 48 tokens, and a sequence may have 44",
        ),
    ],
)
def test_wrong_data_is_explained(
    model: Path, tmp_path: Path, rows: list[dict[str, Any]], keys: dict[str, Any], message: str
) -> None:
    file = write_lines(tmp_path / "d.jsonl", rows)
    with pytest.raises(MergeError) as caught:
        load(model, file, **keys)
    assert message.replace("{place}", str(file)) in str(caught.value)


def test_a_conversation_needs_a_chat_template(tmp_path: Path) -> None:
    model = make_tiny_llama(tmp_path / "plain", chat=False)
    file = write_lines(tmp_path / "d.jsonl", [{"messages": CONVERSATION}])
    with pytest.raises(UsageError, match=r"no chat template, and the data are conversations\. Give one"):
        load(model, file)


def test_a_tokenizer_without_end_and_padding_is_refused_and_can_be_told(tmp_path: Path, model: Path) -> None:
    config = Config(model="m")
    bare = tokenizer_of(model)
    bare.pad_token = bare.eos_token = None
    with pytest.raises(UsageError, match=r"neither an end mark nor a padding token"):
        set_up_tokenizer(bare, config, None)
    notes = set_up_tokenizer(bare, Config(model="m", eos_token="<end>"), None)
    assert (bare.eos_token, bare.pad_token) == ("<end>", "<end>")
    assert notes == ['the tokenizer has no padding token; rows are filled with "<end>", which is masked']


def test_a_template_that_rewrites_earlier_turns_is_refused_unless_only_the_last_counts(
    model: Path, tmp_path: Path
) -> None:
    template = tmp_path / "t.jinja"  # what earlier turns said is left out once another follows
    template.write_text(
        "{% for m in messages %}<{{ m['role'] }}>{% if loop.last or m['role'] == 'user' %}{{ m['content'] }}{% endif %}"
        "<end>{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}",
        encoding="utf-8",
    )
    file = write_lines(tmp_path / "d.jsonl", [{"messages": CONVERSATION}])
    with pytest.raises(UsageError, match=r"writes turn 2 otherwise when turns follow.* Set last_turn_only: true"):
        load(model, file, chat_template=str(template))
    data = load(model, file, chat_template=str(template), last_turn_only=True, prompt_loss_weight=0.0)
    assert shown(data, model)[-1] == ("F<end>", 1)


def test_rows_are_the_same_whatever_the_hash_seed() -> None:
    from finetune.data.encode import Example

    rng = random.Random(0)
    examples = [Example(np.zeros(rng.randint(1, 9), np.int32), np.zeros(1, np.float32), str(i)) for i in range(30)]
    rows = make_rows(examples, 10, packed=True)
    assert rows == make_rows(examples, 10, packed=True)
    assert isinstance(rows[0], BatchRow)
