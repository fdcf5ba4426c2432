"""Token ids and loss masks of `merge finetune --show` against TRL's trainers: 30 rows of each format.

Deviations, which the rows here leave out or which are undone before comparing: TRL counts all turns of an answer of
several turns, ours the assistant's; ours never counts the first token; a token that holds a prompt's end and an
answer's start counts as answer here and as prompt in TRL, which keeps "gpt" as a role.
"""

from __future__ import annotations

import importlib.util
import random
from pathlib import Path
from typing import Any

import pytest
from tiny_llama import make_tiny_llama, write_lines

from finetune.data import Data, encode_samples, read_samples
from finetune.data.tokenizer import set_up_tokenizer
from finetune.keys import Config, DataSource

pytestmark = [
    pytest.mark.full,
    pytest.mark.skipif(importlib.util.find_spec("trl") is None, reason="needs trl (make test-full installs it)"),
    pytest.mark.filterwarnings("default"),  # TRL's and its libraries' own
]
# As tests/tiny_llama.py's, with the marks that TRL needs to find the assistant's turns, and with tools.
TEMPLATE = """\
{%- for tool in tools or [] %}#{{ tool.name }}{% endfor %}
{%- for m in messages %}{% if m.role == 'assistant' %}<assistant>
{%- generation %}{{ m.content or '' }}{% for c in m.tool_calls or [] %}={{ c.function.name }}{% endfor %}<end>
{%- endgeneration %}{% else %}<{{ m.role }}>{{ m.content }}<end>{% endif %}
{%- endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"""
Rows = list[dict[str, Any]]


def word(rng: random.Random) -> str:
    return "".join(rng.choices("abcdefgh ABC", k=rng.randint(1, 9))).strip() or "x"


def turn(role: str, text: str) -> dict[str, str]:
    return {"role": role, "content": text}


def talk(rng: random.Random, rounds: int, system: bool = False) -> list[dict[str, str]]:
    said = [turn("system", word(rng))] if system else []
    for _ in range(rounds):
        said += [turn("user", word(rng)), turn("assistant", word(rng))]
    return said


def calls(rng: random.Random) -> list[dict[str, Any]]:
    call = {"type": "function", "function": {"name": "abc", "arguments": {"a": 1}}}
    asked = {"role": "assistant", "content": "", "tool_calls": [call]}
    return [turn("user", word(rng)), asked, turn("tool", word(rng)), turn("assistant", word(rng))]


def as_messages(row: dict[str, Any]) -> dict[str, Any]:
    """ShareGPT's turns in OpenAI's words, which TRL needs."""
    if "conversations" not in row:
        return row
    roles = {"human": "user", "gpt": "assistant"}
    return {"messages": [turn(roles[one["from"]], one["value"]) for one in row["conversations"]]}


def rows(make: Any) -> Rows:
    rng = random.Random(1)
    return [make(rng) for _ in range(30)]


SUPERVISED: dict[str, tuple[Rows, bool]] = {  # rows, and whether TRL has to be told that the assistant's turns count
    "text": (rows(lambda rng: {"text": word(rng)}), False),
    "prompt_completion": (rows(lambda rng: {"prompt": word(rng) + "=", "completion": word(rng)}), False),
    "prompt_completion of turns": (
        rows(lambda rng: {"prompt": [turn("user", word(rng))], "completion": [turn("assistant", word(rng))]}),
        False,
    ),
    "messages": (rows(lambda rng: {"messages": talk(rng, rng.randint(1, 3), rng.random() < 0.5)}), True),
    "messages with tools": (rows(lambda rng: {"messages": calls(rng), "tools": [{"name": "abc"}]}), True),
    "sharegpt": (
        rows(
            lambda rng: {
                "conversations": [
                    {"from": {"user": "human", "assistant": "gpt"}[one["role"]], "value": one["content"]}
                    for one in talk(rng, 2)
                ]
            }
        ),
        True,
    ),
}
COMPARED: dict[str, Rows] = {
    "texts": rows(lambda rng: {"prompt": word(rng) + "=", "chosen": word(rng) + "A", "rejected": word(rng) + "B"}),
    "turns": rows(
        lambda rng: {
            "prompt": [*talk(rng, 1), turn("user", word(rng))],
            "chosen": [turn("assistant", word(rng) + "A")],
            "rejected": [turn("assistant", word(rng) + "B")],
        }
    ),
    "whole conversations": rows(
        lambda rng: {
            "chosen": (before := [turn("user", word(rng))]) + [turn("assistant", word(rng) + "A")],
            "rejected": [*before, turn("assistant", word(rng) + "B")],
        }
    ),
}


@pytest.fixture(autouse=True)
def templates_as_transformers_renders_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """Other tests of this process have them rendered by merge.chat, which does not say where an answer stands."""
    from transformers.utils import chat_template_utils

    spec = importlib.util.find_spec(chat_template_utils.__name__)
    assert spec is not None
    assert spec.loader is not None
    fresh = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(fresh)
    monkeypatch.setattr(chat_template_utils, "_compile_jinja_template", fresh._compile_jinja_template)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_llama(tmp_path_factory.mktemp("tiny") / "model", context=256)


def tokenizer_of(model: Path) -> Any:
    from transformers import AutoTokenizer

    found = AutoTokenizer.from_pretrained(model)
    found.chat_template = TEMPLATE
    found.add_special_tokens({"additional_special_tokens": ["<tool>"]}, replace_extra_special_tokens=False)
    return found


def ours(model: Path, file: Path, **keys: Any) -> Data:
    config = Config(model=str(model), data=(DataSource(str(file)),), out="o", prompt_loss_weight=0.0, **keys)
    tokenizer = tokenizer_of(model)
    set_up_tokenizer(tokenizer, config, None)
    return encode_samples(read_samples(config, None), config, tokenizer, 256)


def network(model: Path, tokenizer: Any) -> Any:
    from transformers import AutoModelForCausalLM

    net = AutoModelForCausalLM.from_pretrained(model)
    net.resize_token_embeddings(len(tokenizer))
    return net


@pytest.mark.parametrize("kind", SUPERVISED)
def test_ids_and_masks_of_supervised_training(model: Path, tmp_path: Path, kind: str) -> None:
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    data, assistant_only = SUPERVISED[kind]
    settings = {"output_dir": str(tmp_path / "trl"), "use_cpu": True, "bf16": False, "report_to": "none"}
    tokenizer = tokenizer_of(model)
    trainer = SFTTrainer(
        network(model, tokenizer),
        args=SFTConfig(**settings, max_length=None, assistant_only_loss=assistant_only),
        train_dataset=Dataset.from_list([as_messages(row) for row in data]),
        processing_class=tokenizer,
    )
    examples = ours(model, write_lines(tmp_path / "d.jsonl", data)).train.examples
    assert len(examples) == len(trainer.train_dataset) == 30
    for example, theirs in zip(examples, trainer.train_dataset, strict=True):
        assert example.ids.tolist() == theirs["input_ids"]
        mask = [label != -100 for label in theirs["labels"]]
        assert (example.weights > 0).tolist()[1:] == mask[1:]


@pytest.mark.parametrize("kind", COMPARED)
def test_ids_and_masks_of_preferences(model: Path, tmp_path: Path, kind: str) -> None:
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer

    data = COMPARED[kind]
    settings = {"output_dir": str(tmp_path / "trl"), "use_cpu": True, "bf16": False, "report_to": "none"}
    tokenizer = tokenizer_of(model)
    trainer = DPOTrainer(
        network(model, tokenizer),
        args=DPOConfig(**settings, max_length=None),
        train_dataset=Dataset.from_list(data),
        processing_class=tokenizer,
    )
    examples = ours(model, write_lines(tmp_path / "d.jsonl", data)).train.examples
    for example, theirs in zip(examples, trainer.train_dataset, strict=True):
        for (ids, weights), side in zip(example.sequences, ("chosen_ids", "rejected_ids"), strict=True):
            assert ids.tolist() == theirs["prompt_ids"] + theirs[side]
            assert weights.tolist() == [0.0] * len(theirs["prompt_ids"]) + [1.0] * len(theirs[side])
