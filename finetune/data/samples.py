"""Rows -> samples: what an objective learns from, whatever the columns were called.

A format is detected from the columns of the first row, or named; templates in the config make prompt/completion or text
of any columns.
"""

from __future__ import annotations

import string
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from finetune.data.files import Row
from finetune.keys import Config, Source
from merge.errors import UsageError
from merge.recipe.names import suggest

Messages = tuple[tuple[str, str], ...]  # (role, text)


@dataclass(frozen=True, slots=True)
class Conversation:
    """Turns of system, user, assistant and tool; the assistant's are learnt."""

    messages: Messages


@dataclass(frozen=True, slots=True)
class Pair:
    prompt: str
    completion: str


@dataclass(frozen=True, slots=True)
class Text:
    text: str


@dataclass(frozen=True, slots=True)
class Preference:
    """Of two answers the better one; the prompt is a text or the turns before the answer."""

    prompt: str | Messages
    chosen: str
    rejected: str


@dataclass(frozen=True, slots=True)
class Labelled:
    text: str
    label: str


Content = Conversation | Pair | Text | Preference | Labelled


@dataclass(frozen=True, slots=True)
class Sample:
    place: str
    task: str | None
    content: Content


# The prompt of Taori et al. 2023 (Stanford Alpaca) without its preamble.
ALPACA = "### Instruction:\n{instruction}\n\n### Response:\n"
ALPACA_INPUT = "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:\n"
_ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bot": "assistant",
    "assistant": "assistant",
    "model": "assistant",
    "system": "system",
    "tool": "tool",
    "function": "tool",
    "observation": "tool",
}


def make_samples(rows: list[Row], source: Source, config: Config) -> list[Sample]:
    """One sample a row.

    Raises:
        UsageError: columns or template fields that the data does not have, values of a wrong kind; with their place.
    """
    read = _reader(rows[0], source, config)
    return [Sample(row.place, source.task, read(row)) for row in rows]


def _reader(first: Row, source: Source, config: Config) -> Callable[[Row], Content]:
    """Templates of the data entry go before those of the whole config, and both before formats."""
    if source.text is not None or (config.text is not None and source.prompt is None and source.format is None):
        text = Template(source.text or config.text or "", "text", first)
        return lambda row: Text(text(row))
    level = source if source.prompt is not None else config
    if level.prompt is not None and source.format is None:
        prompt, completion = (
            Template(level.prompt, "prompt", first),
            Template(level.completion or "", "completion", first),
        )
        return lambda row: Pair(prompt(row), completion(row))
    name = source.format or config.format or detect(first)
    missing = [column for column in NEEDS[name] if not any(part in first.columns for part in column.split("|"))]
    if missing:
        wanted = ", ".join(column.replace("|", " or ") for column in NEEDS[name])
        raise UsageError(f"data {first.place}: format {name} needs the columns {wanted}; found: {_columns(first)}.")
    return _READERS[name]


def detect(row: Row) -> str:
    """The first format whose columns are all there. Raises UsageError if there is none."""
    for name, needs in NEEDS.items():
        if all(any(part in row.columns for part in column.split("|")) for column in needs):
            return name
    raise UsageError(
        f"data {row.place}: cannot tell the format from the columns {_columns(row)}. Give templates, for example "
        'prompt: "Q: {question}\\nA: " and completion: "{answer}", or rename columns: '
        + "; ".join(f"{name} has {' + '.join(needs)}" for name, needs in NEEDS.items())
        + "."
    )


class Template:
    """`"Q: {question}"`: columns in braces; {{ and }} are braces."""

    def __init__(self, text: str, key: str, first: Row) -> None:
        self.text, self.key = text, key
        try:
            parts = list(string.Formatter().parse(text))
        except ValueError as error:
            raise UsageError(f'{key} template "{text}": {error}; write {{{{ for a brace.') from None
        for _, name, form, turned in parts:
            if form or turned:
                raise UsageError(f'{key} template "{text}": write {{{name}}} alone; columns are taken as they are.')
        self.parts = [(before, name) for before, name, _, _ in parts]
        for name in filter(None, (name for _, name in self.parts)):
            if name not in first.columns:
                hint = suggest(name, list(first.columns))
                raise UsageError(f'{key} template: unknown field "{{{name}}}" in {first.place}; {hint}')
        if any(name == "" for _, name in self.parts):
            raise UsageError(f'{key} template "{text}": empty braces; name a column, or write {{{{}}}}.')

    def __call__(self, row: Row) -> str:
        return "".join(before + (_text(row, name) if name else "") for before, name in self.parts)


def _columns(row: Row) -> str:
    return ", ".join(map(str, row.columns)) or "none"


def _text(row: Row, column: str) -> str:
    """A column as text; numbers and booleans are written out."""
    if column not in row.columns:
        raise UsageError(f'data {row.place}: no column "{column}"; found: {_columns(row)}.')
    value = row.columns[column]
    if isinstance(value, (str, bool, int, float)):
        return _whole(str(value), row, column)
    found = {type(None): "nothing", dict: "an object"}.get(type(value), f"a {type(value).__name__}")
    raise UsageError(f'data {row.place}: "{column}" must be a text, found {found}.')


def _whole(text: str, row: Row, column: str) -> str:
    """Raises UsageError for half of a surrogate pair, as of an emoji cut in two: no tokenizer takes it."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        half = ascii(text[error.start])
        raise UsageError(f'data {row.place}: "{column}" has half a letter, {half}. Remove it.') from None
    return text


def _one(row: Row, *names: str) -> str:
    return _text(row, next((name for name in names if name in row.columns), names[0]))


def _messages(row: Row, column: str) -> Messages:
    turns = row.columns.get(column)
    if not isinstance(turns, list) or not turns:
        raise UsageError(f'data {row.place}: "{column}" must be a list of turns, found {str(turns)[:40]!r}.')
    found = []
    for number, turn in enumerate(turns, 1):
        pair = _turn(turn)
        if isinstance(turn, Mapping) and turn.get("tool_calls"):
            raise UsageError(
                f'data {row.place}: turn {number} of "{column}" has tool_calls, which are not read here. Write the '
                "call into its content, as the model is to write it."
            )
        if pair is None:
            raise UsageError(
                f'data {row.place}: turn {number} of "{column}" must have role and content (or from and value), '
                f"with a role of {', '.join(dict.fromkeys(_ROLES.values()))}; found {str(turn)[:60]!r}."
            )
        found.append((pair[0], _whole(pair[1], row, column)))
    return tuple(found)


def _turn(turn: Any) -> tuple[str, str] | None:
    if not isinstance(turn, Mapping):
        return None
    role = _ROLES.get(str(turn.get("role", turn.get("from", ""))))
    content = turn.get("content", turn.get("value"))
    return (role, content) if role and isinstance(content, str) else None


def _conversation(column: str) -> Callable[[Row], Content]:
    def read(row: Row) -> Content:
        messages = _messages(row, column)
        if all(role != "assistant" for role, _ in messages):
            raise UsageError(f'data {row.place}: "{column}" has no turn of the assistant, so nothing is learnt.')
        return Conversation(messages)

    return read


def _alpaca(row: Row) -> Content:
    given = "input" in row.columns and row.columns["input"] not in (None, "")
    fields = {"instruction": _text(row, "instruction")} | ({"input": _text(row, "input")} if given else {})
    return Pair((ALPACA_INPUT if given else ALPACA).format(**fields), _text(row, "output"))


def _preference(row: Row) -> Content:
    """chosen and rejected are texts, or whole conversations that differ in their last turn."""
    if isinstance(row.columns["chosen"], list):
        chosen, rejected = _messages(row, "chosen"), _messages(row, "rejected")
        if "prompt" in row.columns and isinstance(row.columns["prompt"], list):
            return Preference(_messages(row, "prompt"), chosen[-1][1], rejected[-1][1])
        if chosen[:-1] != rejected[:-1]:
            raise UsageError(f'data {row.place}: "chosen" and "rejected" differ before their last turn.')
        return Preference(chosen[:-1], chosen[-1][1], rejected[-1][1])
    return Preference(_text(row, "prompt"), _text(row, "chosen"), _text(row, "rejected"))


def _anchor(row: Row) -> Content:
    """Texts that belong together, and one that does not belong to the first, if there is one."""
    anchor, positive = _one(row, "anchor", "query"), _text(row, "positive")
    if "negative" in row.columns:
        return Preference(anchor, positive, _text(row, "negative"))
    return Pair(anchor, positive)


# Detected in this order: the columns of a later format may be among those of an earlier one.
NEEDS: dict[str, tuple[str, ...]] = {
    "messages": ("messages",),
    "sharegpt": ("conversations",),
    "preference": ("chosen", "rejected"),
    "anchor_positive": ("anchor|query", "positive"),
    "alpaca": ("instruction", "output"),
    "prompt_completion": ("prompt", "completion|response|answer"),
    "text_label": ("text|sentence", "label"),
    "text": ("text",),
}
_READERS: dict[str, Callable[[Row], Content]] = {
    "messages": _conversation("messages"),
    "sharegpt": _conversation("conversations"),
    "preference": _preference,
    "anchor_positive": _anchor,
    "alpaca": _alpaca,
    "prompt_completion": lambda row: Pair(_text(row, "prompt"), _one(row, "completion", "response", "answer")),
    "text_label": lambda row: Labelled(_one(row, "text", "sentence"), _text(row, "label")),
    "text": lambda row: Text(_text(row, "text")),
}
