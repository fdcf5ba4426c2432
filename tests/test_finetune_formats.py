"""Formats of training data: a golden row of each public one, and columns that are read, named or refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tiny_llama import write_lines

from finetune.data import read_samples
from finetune.data.contents import Conversation, Instruction, Judged, Labelled, Preference, Text, TextPair, Turn
from finetune.data.files import read_rows
from finetune.data.samples import make_samples
from finetune.keys import Config, DataSource
from merge.errors import RecipeError, UsageError


def user(text: str) -> Turn:
    return Turn("user", text)


def said(text: str | None, learnt: bool = True, **more: Any) -> Turn:
    return Turn("assistant", text, learnt, json.dumps(more, separators=(",", ":")) if more else "")


def read(tmp_path: Path, row: dict[str, Any], notes: list[str] | None = None, **keys: Any) -> Any:
    rows = read_rows(write_lines(tmp_path / "d.jsonl", [row]))
    (sample,) = make_samples(rows, DataSource("d.jsonl"), Config(**keys), [] if notes is None else notes)
    return sample.content


WEATHER = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object", "properties": {}}}}
CALL = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Rome"}}}
HH = "\n\nHuman: Hi\n\nAssistant: Hello.\n\nHuman: 1+1?\n\nAssistant: "
TALK = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello."}]
GOLDEN: dict[str, tuple[dict[str, Any], Any]] = {
    "prompt and completion": ({"prompt": "p", "completion": "c"}, TextPair("p", "c")),
    "prompt and response": ({"prompt": "p", "response": "c", "id": 3}, TextPair("p", "c")),
    "an empty completion": ({"prompt": "p", "completion": ""}, TextPair("p", "")),
    "prompt and completion as conversations (TRL)": (
        {"prompt": [TALK[0]], "completion": [TALK[1]]},
        Conversation((Turn("user", "Hi", False), said("Hello."))),
    ),
    "prompt with a system prompt": (
        {"system": "Be kind.", "prompt": "p", "completion": "c"},
        Conversation((Turn("system", "Be kind."), user("p"), said("c"))),
    ),
    "alpaca": ({"instruction": "i", "input": "", "output": "o"}, Instruction("i", "", "o")),
    "alpaca with input": ({"instruction": "i", "input": "n", "output": "o"}, Instruction("i", "n", "o")),
    "alpaca with its own text column": (
        {"instruction": "i", "input": "", "output": "o", "text": "Below is an instruction ..."},
        Instruction("i", "", "o"),
    ),
    "alpaca with system and history (LLaMA-Factory)": (
        {"instruction": "i", "input": "n", "output": "o", "system": "s", "history": [["a", "b"], ["c", "d"]]},
        Instruction("i", "n", "o", "s", (("a", "b"), ("c", "d"))),
    ),
    "sharegpt": (
        {"id": "x", "conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello."}]},
        Conversation((user("Hi"), said("Hello."))),
    ),
    "sharegpt with system and tools (LLaMA-Factory)": (
        {
            "conversations": [
                {"from": "human", "value": "Rome?"},
                {"from": "function_call", "value": '{"name": "weather", "arguments": {"city": "Rome"}}'},
                {"from": "observation", "value": "sunny"},
                {"from": "gpt", "value": "Sun."},
            ],
            "system": "Use tools.",
            "tools": json.dumps([WEATHER]),
        },
        Conversation(
            (
                *(Turn("system", "Use tools."), user("Rome?"), said(None, tool_calls=[CALL])),
                *(Turn("tool", "sunny"), said("Sun.")),
            ),
            json.dumps([WEATHER], separators=(",", ":")),
        ),
    ),
    "openai messages": ({"messages": TALK}, Conversation((user("Hi"), said("Hello.")))),
    "openai tools, calls with arguments as JSON": (
        {
            "messages": [
                {
                    "role": "developer",
                    "content": [{"type": "text", "text": "Use "}, {"type": "text", "text": "tools."}],
                },
                {"role": "user", "content": "Rome?"},
                {
                    "role": "assistant",
                    "content": None,
                    "tool_calls": [
                        {
                            "id": "c1",
                            "type": "function",
                            "function": {"name": "weather", "arguments": '{"city":"Rome"}'},
                        }
                    ],
                },
                {"role": "tool", "tool_call_id": "c1", "content": "sunny"},
                {"role": "assistant", "content": "Sun."},
            ],
            "tools": [WEATHER],
        },
        Conversation(
            (
                Turn("developer", "Use tools."),
                user("Rome?"),
                said(None, tool_calls=[CALL | {"id": "c1"}]),
                Turn("tool", "sunny", True, '{"tool_call_id":"c1"}'),
                said("Sun."),
            ),
            json.dumps([WEATHER], separators=(",", ":")),
        ),
    ),
    "openai weight of a turn": (
        {"messages": [*TALK[:1], TALK[1] | {"weight": 0}, *TALK[:1], TALK[1] | {"weight": 1}]},
        Conversation((user("Hi"), said("Hello.", False), user("Hi"), said("Hello."))),
    ),
    "axolotl train": (
        {"messages": [TALK[0] | {"train": False}, TALK[1], TALK[0], TALK[1] | {"train": False}]},
        Conversation((Turn("user", "Hi", False), said("Hello."), user("Hi"), said("Hello.", False))),
    ),
    "reasoning": (
        {"messages": [TALK[0], TALK[1] | {"reasoning_content": "A greeting."}]},
        Conversation((user("Hi"), said("Hello.", reasoning_content="A greeting."))),
    ),
    "preference": ({"prompt": "p", "chosen": "c", "rejected": "r"}, Preference("p", "c", "r")),
    "preference of transcripts (HH)": (
        {"chosen": HH + "2", "rejected": HH + "3"},
        Preference((user("Hi"), said("Hello."), user("1+1?")), (said("2"),), (said("3"),)),
    ),
    "preference of conversations (UltraFeedback)": (
        {
            "prompt": "Hi",
            "prompt_id": "x",
            "chosen": TALK,
            "rejected": [TALK[0], {"role": "assistant", "content": "No."}],
            "messages": TALK,
            "score_chosen": 8.0,
            "score_rejected": 2.0,
        },
        Preference((user("Hi"),), (said("Hello."),), (said("No."),)),
    ),
    "preference over several turns": (
        {
            "chosen": [*TALK, *TALK],
            "rejected": [
                TALK[0],
                {"role": "assistant", "content": "No."},
                TALK[0],
                {"role": "assistant", "content": "Go."},
            ],
        },
        Preference((user("Hi"),), (said("Hello."), user("Hi"), said("Hello.")), (said("No."), user("Hi"), said("Go."))),
    ),
    "preference with turns before and after (TRL)": (
        {"prompt": TALK[:1], "chosen": TALK[1:], "rejected": [{"role": "assistant", "content": "No."}]},
        Preference((user("Hi"),), (said("Hello."),), (said("No."),)),
    ),
    "ranking after sharegpt turns (LLaMA-Factory)": (
        {
            "conversations": [{"from": "human", "value": "Hi"}],
            "chosen": {"from": "gpt", "value": "Hello."},
            "rejected": {"from": "gpt", "value": "No."},
        },
        Preference((user("Hi"),), (said("Hello."),), (said("No."),)),
    ),
    "ranking in alpaca's columns (LLaMA-Factory)": (
        {"instruction": "i", "input": "n", "chosen": "c", "rejected": "r"},
        Preference("i\nn", "c", "r"),
    ),
    "kto": ({"prompt": "p", "completion": "c", "label": False}, Judged("p", "c", False)),
    "kto of conversations (TRL)": (
        {"prompt": TALK[:1], "completion": TALK[1:], "label": True},
        Judged((user("Hi"),), (said("Hello."),), True),
    ),
    "kto after sharegpt turns (LLaMA-Factory)": (
        {"messages": TALK, "label": False},
        Judged((user("Hi"),), (said("Hello."),), False),
    ),
    "kto in alpaca's columns (LLaMA-Factory)": (
        {"instruction": "i", "input": "", "output": "o", "kto_tag": True},
        Judged("i", "o", True),
    ),
    "text": ({"text": "t", "url": "x"}, Text("t")),
    "labelled text": ({"text": "t", "label": 2}, Labelled("t", "2")),
    "labelled sentence": ({"sentence": "t", "label": "good", "idx": 1}, Labelled("t", "good")),
    "pairs for embeddings": ({"anchor": "a", "positive": "p"}, TextPair("a", "p")),
    "triplets for embeddings": ({"query": "a", "positive": "p", "negative": "n"}, Preference("a", "p", "n")),
}


@pytest.mark.parametrize("kind", GOLDEN)
def test_golden_rows_of_public_formats(tmp_path: Path, kind: str) -> None:
    row, expected = GOLDEN[kind]
    assert read(tmp_path, row) == expected


def test_null_columns_of_parquet_files_say_nothing(tmp_path: Path) -> None:
    row = {"prompt": "p", "completion": "c", "label": None, "system": None, "tools": [], "messages": None}
    assert read(tmp_path, row) == TextPair("p", "c")


def test_unused_columns_are_named_once(tmp_path: Path) -> None:
    rows = read_rows(write_lines(tmp_path / "d.jsonl", [{"text": "t", "url": "x"}, {"text": "u", "date": 3}]))
    notes: list[str] = []
    make_samples(rows, DataSource("d.jsonl"), Config(), notes)
    assert notes == ["data d.jsonl: format text; columns not used: url, date"]
    notes = []
    make_samples(rows, DataSource("d.jsonl", text="{text}."), Config(ignore_columns=("date",)), notes)
    assert notes == ["data d.jsonl: template; columns not used: url"]


LOST: dict[str, tuple[dict[str, Any], str]] = {
    "a system prompt beside text": ({"text": "t", "system": "s"}, "format text does not read system"),
    "tools beside alpaca": ({"instruction": "i", "output": "o", "tools": "[1]"}, "format alpaca does not read tools"),
    "images": ({"messages": TALK, "images": ["x.png"]}, "format messages does not read images"),
    "another conversation": (
        {"prompt": "Hi", "chosen": TALK, "rejected": TALK, "messages": TALK[:1]},
        'the column "messages" is not the chosen conversation',
    ),
    "another prompt": (
        {"prompt": "Bye", "chosen": TALK, "rejected": [TALK[0], {"role": "assistant", "content": "No."}]},
        '"chosen" and "rejected" do not begin with the column "prompt"',
    ),
    "two system prompts": (
        {"system": "a", "messages": [{"role": "system", "content": "b"}, *TALK]},
        'the column "system" and the first turn are different',
    ),
    "an unknown key of a turn": (
        {"messages": [TALK[0], TALK[1] | {"mood": "glad"}]},
        r'd.jsonl:1: "messages", turn 2: mood would be lost',
    ),
    "a picture in a turn": (
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}, TALK[1]]},
        'turn 1: content of type "image_url"; only text',
    ),
    "an unknown role": ({"messages": [{"role": "narrator", "content": "x"}]}, 'turn 1: unknown role "narrator"'),
    "half a weight": ({"messages": [TALK[0], TALK[1] | {"weight": 0.5}]}, '"weight" must be 0 or 1'),
    "a learnt user": ({"messages": [TALK[0] | {"train": True}, TALK[1]]}, "only the assistant is learnt"),
    "nothing learnt": ({"messages": [TALK[0], TALK[1] | {"weight": 0}]}, "no turn of the assistant that is learnt"),
    "answers that part at the user": (
        {"chosen": TALK, "rejected": [{"role": "user", "content": "Ho"}, TALK[1]]},
        "part at turn 1, which is not the assistant's",
    ),
    "a preference without a prompt": ({"chosen": "a", "rejected": "b"}, 'no column "prompt"'),
    "a label that is no judgement": (
        {"prompt": "p", "completion": "c", "label": "good"},
        '"label" must be true or false',
    ),
    "broken tools": ({"messages": TALK, "tools": "[{"}, '"tools" is not valid JSON'),
    "a broken history": ({"instruction": "i", "output": "o", "history": ["a"]}, '"history" must be a list of'),
}


@pytest.mark.parametrize("kind", LOST)
def test_nothing_that_says_how_a_row_is_meant_is_lost(tmp_path: Path, kind: str) -> None:
    row, message = LOST[kind]
    with pytest.raises(UsageError, match=message):
        read(tmp_path, row)


def test_columns_can_be_ignored_by_name(tmp_path: Path) -> None:
    assert read(tmp_path, {"text": "t", "system": "s"}, ignore_columns=("system",)) == Text("t")
    rows = read_rows(write_lines(tmp_path / "e.jsonl", [{"prompt": "p", "completion": "c", "label": False}]))
    (sample,) = make_samples(rows, DataSource("e.jsonl", ignore_columns=("label",)), Config(), [])
    assert sample.content == TextPair("p", "c")


def test_a_later_row_of_another_kind_is_refused(tmp_path: Path) -> None:
    rows = read_rows(write_lines(tmp_path / "d.jsonl", [{"text": "t"}, {"text": "u", "label": 1}]))
    with pytest.raises(UsageError, match=r"d.jsonl:2: format text does not read label"):
        make_samples(rows, DataSource("d.jsonl"), Config(), [])


@pytest.mark.parametrize(
    ("first", "later", "message"),
    [
        (
            {"prompt": "p", "chosen": "c", "rejected": "r"},
            {"prompt": "p", "chosen": "c"},
            'no column "rejected"; found: prompt, chosen',
        ),
        ({"text": "t", "label": "a"}, {"text": "t"}, 'no column "label"; found: text'),
        ({"prompt": "p", "completion": "c"}, {"completion": "c"}, 'no column "prompt"; found: completion'),
    ],
)
def test_a_later_row_that_lacks_a_column_is_refused(
    tmp_path: Path, first: dict[str, str], later: dict[str, str], message: str
) -> None:
    rows = read_rows(write_lines(tmp_path / "d.jsonl", [first, later]))
    with pytest.raises(UsageError, match=rf"d.jsonl:2: {message}"):
        make_samples(rows, DataSource("d.jsonl"), Config(), [])


def hub(columns: list[dict[str, Any]]) -> Any:
    """A stand-in for `datasets`, which would fetch: what it was asked for, and a data set."""
    import types

    import datasets

    asked: list[Any] = []

    def load_dataset(name: str, subset: str | None, split: str) -> Any:
        asked.append((name, subset, split))
        return datasets.Dataset.from_list(columns)

    return types.SimpleNamespace(load_dataset=load_dataset, asked=asked)


def test_data_sets_of_the_hub_are_read_by_name(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import datasets

    stand_in = hub([{"instruction": "i", "input": "", "output": "o"}])
    monkeypatch.setattr(datasets, "load_dataset", stand_in.load_dataset)
    config = Config(data=(DataSource("org/alpaca", subset="en", split="train[:1]"),))
    found = read_samples(config, tmp_path)
    assert stand_in.asked == [("org/alpaca", "en", "train[:1]")]
    assert [(sample.place, sample.content) for sample in found.train] == [("org/alpaca:1", Instruction("i", "", "o"))]
    assert found.files["org/alpaca"]


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (
            DataSource("org/name-that-is-not-cached"),
            "data org/name-that-is-not-cached: there is no such file, and the hub's",
        ),
        (DataSource("none.jsonl"), "data none.jsonl: there is no such file"),
        (
            DataSource("here.jsonl", split="test"),
            "data here.jsonl: is a file; only data sets of the hub have subset and split",
        ),
    ],
)
def test_what_is_neither_file_nor_data_set_is_said(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, source: DataSource, message: str
) -> None:
    write_lines(tmp_path / "here.jsonl", [{"text": "t"}])
    with pytest.raises(RecipeError, match=message):
        read_samples(Config(data=(source,)), tmp_path)
