"""Conversations in the chat template: what is learnt of them, tool calls, and what a template would leave out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tiny_llama import make_tiny_llama

from finetune.data.contents import Content, Conversation, Instruction, Judged, Preference, Sample, TextPair, Turn
from finetune.data.encode import Encoder
from finetune.data.settle import settle
from finetune.keys import Config
from merge.chat.named import NAMED
from merge.errors import UsageError

# As the templates of Hermes and Qwen write tools.
TOOLS = """\
{%- if tools %}<tools>{% for tool in tools %}{{ tool | tojson }}{% endfor %}</tools>{% endif %}
{%- for message in messages %}<{{ message.role }}>
{%- if message.reasoning_content %}<think>{{ message.reasoning_content }}</think>{% endif %}
{%- if message.content %}{{ message.content }}{% endif %}
{%- for call in message.tool_calls or [] %}<call>{{ call.function | tojson }}</call>{% endfor %}<end>
{%- endfor %}
{%- if add_generation_prompt %}<assistant>{% endif %}"""
SHORT = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}<end>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
CALL = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Rome"}}}
WEATHER = json.dumps([{"type": "function", "function": {"name": "weather"}}])
TALK = (
    Turn("user", "Rome?"),
    Turn("assistant", None, True, json.dumps({"tool_calls": [CALL]})),
    Turn("tool", "sunny"),
    Turn("assistant", "Sun."),
)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_llama(tmp_path_factory.mktemp("tiny") / "model")


def tokenizer(model: Path, template: str | None) -> Any:
    from transformers import AutoTokenizer

    found = AutoTokenizer.from_pretrained(model)
    found.chat_template = template
    return found


def parts(model: Path, conversation: Conversation, template: str = TOOLS, **keys: Any) -> list[tuple[str, float]]:
    encoder = Encoder(tokenizer(model, template), Config(**keys), 512)
    return [(one.text, one.learnt) for one in encoder.turns(conversation, "d:1")]


def test_a_tool_call_is_learnt_and_its_observation_is_not(model: Path) -> None:
    call = '<call>{"name": "weather", "arguments": {"city": "Rome"}}</call><end>'
    assert parts(model, Conversation(TALK, WEATHER)) == [
        (f"<tools>{json.dumps(json.loads(WEATHER)[0])}</tools><user>Rome?<end><assistant>", 0.1),
        (call, 1.0),
        ("<tool>sunny<end><assistant>", 0.1),
        ("Sun.<end>", 1.0),
    ]


def test_turns_that_are_not_learnt_count_nothing(model: Path) -> None:
    talk = (Turn("user", "a"), Turn("assistant", "b", False), Turn("user", "c"), Turn("assistant", "d"))
    assert parts(model, Conversation(talk), SHORT) == [
        ("<user>a<end><assistant>", 0.1),
        ("b<end>", 0.0),
        ("<user>c<end><assistant>", 0.1),
        ("d<end>", 1.0),
    ]
    again = (*talk, Turn("user", "e"), Turn("assistant", "f"))
    assert parts(model, Conversation(again), SHORT, last_turn_only=True)[-1] == ("f<end>", 1.0)
    assert sum(learnt for _, learnt in parts(model, Conversation(again), SHORT, prompt_loss_weight=0.0)) == 2


def test_a_developer_is_the_system_where_the_template_does_not_know_one(model: Path) -> None:
    talk = Conversation((Turn("developer", "Be kind."), Turn("user", "a"), Turn("assistant", "b")))
    assert parts(model, talk, SHORT)[0][0] == "<system>Be kind.<end><user>a<end><assistant>"
    knows = "{# developer #}" + SHORT
    assert parts(model, talk, knows)[0][0].startswith("<developer>")


@pytest.mark.parametrize(
    ("talk", "message"),
    [
        (Conversation(TALK), 'leaves out "weather" of turn 2'),
        (Conversation(TALK[:1] + TALK[3:], WEATHER), "does not support tools"),
        (
            Conversation((TALK[0], Turn("assistant", "Sun.", True, '{"reasoning_content":"It is hot."}'))),
            r'leaves out "It is hot." of turn 2 \(assistant\)',
        ),
    ],
)
def test_what_a_template_leaves_out_is_an_error(model: Path, talk: Conversation, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        parts(model, talk, SHORT)


def test_a_template_without_system_prompts_is_an_error(model: Path) -> None:
    deaf = "{% for m in messages if m.role != 'system' %}<{{ m.role }}>{{ m.content }}{% endfor %}"
    with pytest.raises(UsageError, match=r'leaves out "Be kind." of turn 1 \(system\)'):
        parts(model, Conversation((Turn("system", "Be kind."), *TALK[:1], *TALK[3:])), deaf)


def settled(model: Path, content: Content, template: str | None, **keys: Any) -> tuple[Content, list[str]]:
    notes: list[str] = []
    samples = [Sample("d:1", None, content), Sample("d:2", None, content)]
    return settle(samples, Config(**keys), tokenizer(model, template), notes)[0].content, notes


def test_alpaca_rows_go_into_the_template_or_the_scaffold_and_a_note_says_which(model: Path) -> None:
    row = Instruction("Add.", "1 2", "3", "Be exact.", (("Hi", "Hello."),))
    found, notes = settled(model, row, SHORT)
    assert found == Conversation(
        (
            *(Turn("system", "Be exact."), Turn("user", "Hi"), Turn("assistant", "Hello.")),
            *(Turn("user", "Add.\n1 2"), Turn("assistant", "3")),
        )
    )
    assert notes == ["alpaca rows are written in the chat template; chat: false changes that"]
    found, notes = settled(model, row, None)
    assert found == TextPair(
        "Be exact.\n\n### Instruction:\nHi\n\n### Response:\nHello.\n\n"
        "### Instruction:\nAdd.\n\n### Input:\n1 2\n\n### Response:\n",
        "3",
    )
    assert notes == ['alpaca rows are written in the "### Instruction:" scaffold; chat: true changes that']
    assert isinstance(settled(model, row, SHORT, chat=False)[0], TextPair)


def test_texts_go_into_the_template_only_if_asked(model: Path) -> None:
    turns = (Turn("user", "p"),), (Turn("assistant", "c"),), (Turn("assistant", "r"),)
    assert settled(model, TextPair("p", "c"), SHORT)[0] == TextPair("p", "c")
    assert settled(model, TextPair("p", "c"), SHORT, chat=True)[0] == Conversation((*turns[0], *turns[1]))
    assert settled(model, Preference("p", "c", "r"), SHORT, chat=True)[0] == Preference(*turns)
    with pytest.raises(UsageError, match="the tokenizer has no chat template"):
        settled(model, Preference(*turns), None)


def test_judged_answers_get_the_answer_of_the_next_example(model: Path) -> None:
    samples = [Sample(f"d:{i}", None, Judged(f"p{i}", f"c{i}", i % 2 == 0)) for i in range(3)]
    found = [sample.content for sample in settle(samples, Config(), tokenizer(model, None), [])]
    assert [one.foreign for one in found if isinstance(one, Judged)] == ["c1", "c2", "c0"]
    with pytest.raises(UsageError, match="kto needs at least two examples"):
        settle(samples[:1], Config(), tokenizer(model, None), [])


def test_the_answers_of_several_turns_are_compared_whole(model: Path) -> None:
    encoder = Encoder(tokenizer(model, SHORT), Config(), 512)
    seen: list[tuple[str, float]] = []
    encoder.segments = lambda segments, special: seen.extend((s.text, s.learnt) for s in segments)  # type: ignore
    encoder.answer((Turn("user", "a"), Turn("assistant", "b")), (Turn("assistant", "c"), *TALK[:1], TALK[3]), "", "d:1")
    assert [text for text, learnt in seen if learnt] == ["c<end>", "Sun.<end>"]
    assert {learnt for _, learnt in seen} == {0.0, 1.0}


@pytest.mark.parametrize(
    ("name", "end"),
    [
        ("chatml", "<|im_end|>\n"),
        ("llama3", "<|eot_id|>"),
        ("mistral", "<eos>"),
        ("gemma", "<end_of_turn>\n"),
        ("zephyr", "<eos>\n"),
        ("vicuna", "<eos>\n"),
        ("alpaca", "<eos>\n\n"),
    ],
)
def test_every_answer_is_learnt_with_its_end_mark_in_all_known_templates(model: Path, name: str, end: str) -> None:
    """Turns that are found by searching for their text, or by the tokenizer's end mark, are missed in some of these."""
    talk = (Turn("system", "Be kind."), *(Turn(role, text) for text in "ab" for role in ("user", "assistant")))
    found = parts(model, Conversation(talk), NAMED[name])
    learnt = [text for text, weight in found if weight == 1]
    assert [text.strip(" ") for text in learnt] == [f"a{end}", f"b{end}"]
    encoder = Encoder(tokenizer(model, NAMED[name]), Config(), 512)
    assert "".join(text for text, _ in found) == encoder.render(Conversation(talk), "d:1")
