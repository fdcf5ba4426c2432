"""Reads turns of conversations in OpenAI's chat format and ShareGPT's.

Each part of a turn is either kept or refused with its place: role, text, tool calls and their results, reasoning, and
whether the turn is learnt.
"""

from __future__ import annotations

import json
from collections.abc import Mapping

from finetune.data.contents import Turn, Turns
from finetune.data.files import Row
from merge.errors import UsageError
from merge.jsontext import parse_json
from merge.quoting import quoted

ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bot": "assistant",
    "assistant": "assistant",
    "model": "assistant",
    "function_call": "assistant",
    "system": "system",
    "developer": "developer",
    "tool": "tool",
    "function": "tool",
    "observation": "tool",
}
REASONING = ("reasoning_content", "thinking")  # as Qwen's and DeepSeek's templates read it, and gpt-oss's
_PASSED = ("tool_calls", "tool_call_id", "name", *REASONING)
_LEARNT = ("weight", "train")  # OpenAI's key, and axolotl's
_READ = {"role", "from", "content", "value", "function_call", *_PASSED, *_LEARNT}
# Leaving these out loses nothing; others could change the meaning, and are refused.
_HARMLESS = {"id", "timestamp", "created_at", "source", "model", "end_turn", "recipient", "refusal", "annotations"}


def read_turns(row: Row, column: str) -> Turns:
    """The turns of a column.

    Raises:
        UsageError: not a list of turns; with row, column and turn.
    """
    turns = row.columns.get(column)
    if isinstance(turns, str) and turns.lstrip().startswith("["):
        turns = parsed(row, column, turns)
    if isinstance(turns, dict):  # one turn, as LLaMA-Factory's rankings have it
        turns = [turns]
    if not isinstance(turns, list) or not turns:
        raise UsageError(f'data {row.place}: "{column}" must be a list of turns, found {quoted(turns)}.')
    return tuple(_Reader(row, column, number).read(turn) for number, turn in enumerate(turns, 1))


def parsed(row: Row, column: str, text: str) -> object:
    """JSON within a column. Raises UsageError."""
    try:
        return parse_json(text)
    except ValueError as error:
        raise UsageError(f'data {row.place}: "{column}" {error}.') from None


def read_tools(row: Row) -> str:
    """The schemas of the column "tools", a list or JSON of one, as JSON; "" where there are none."""
    tools = row.columns.get("tools")
    if isinstance(tools, str) and tools.strip():
        tools = parsed(row, "tools", tools)
    if tools in (None, "", []):
        return ""
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise UsageError(f'data {row.place}: "tools" must be a list of JSON schemas, found {quoted(tools)}.')
    return compact([_without_nothing(tool) for tool in tools])


def compact(value: object) -> str:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"))


def _without_nothing(value: object) -> object:
    """Drops keys whose value is null: columnar files write all keys in every row."""
    if isinstance(value, dict):
        return {key: _without_nothing(part) for key, part in value.items() if part is not None}
    return [_without_nothing(part) for part in value] if isinstance(value, list) else value


class _Reader:
    """One turn, with the place for messages."""

    def __init__(self, row: Row, column: str, number: int) -> None:
        self.row, self.where = row, f'data {row.place}: "{column}", turn {number}'
        self.column = column

    def read(self, turn: object) -> Turn:
        if not isinstance(turn, dict):
            raise UsageError(f'{self.where}: expected {{"role", "content"}}, found {quoted(turn)}.')
        said = {key: value for key, value in turn.items() if value is not None}
        if unknown := sorted(set(said) - _READ - _HARMLESS):
            raise UsageError(
                f"{self.where}: {', '.join(unknown)} would be lost; a turn has role, content, tool_calls, "
                "tool_call_id, name, reasoning_content or thinking, weight or train. Remove what is not needed."
            )
        spoken = str(said.get("role", said.get("from", "")))
        role = ROLES.get(spoken)
        if role is None:
            raise UsageError(
                f'{self.where}: unknown role "{spoken[:40]}"; known: {", ".join(dict.fromkeys(ROLES))}. '
                'Expected {"role", "content"} or {"from", "value"}.'
            )
        content = self._content(said.get("content", said.get("value")))
        more = {key: _without_nothing(said[key]) for key in _PASSED if said.get(key) not in ("", []) and key in said}
        if spoken == "function_call":
            content, more["tool_calls"] = None, self._calls(content)
        elif "function_call" in said:  # OpenAI's first way of calling
            more["tool_calls"] = self._calls(said["function_call"])
        elif "tool_calls" in more:
            more["tool_calls"] = self._calls(more["tool_calls"])
        if content is None and not more.get("tool_calls"):
            raise UsageError(f"{self.where}: has no content.")
        if more.get("tool_calls") and role != "assistant":
            raise UsageError(f"{self.where}: tool calls are the assistant's, found role {role}.")
        return Turn(role, content, self._learnt(said, role), compact(more) if more else "")

    def _content(self, value: object) -> str | None:
        """A string, or a list of text parts."""
        if isinstance(value, list):
            parts = []
            for part in value:
                if not (isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str)):
                    kind = part.get("type") if isinstance(part, dict) else type(part).__name__
                    raise UsageError(f'{self.where}: content of type "{kind}"; only text is trained on.')
                parts.append(part["text"])
            value = "".join(parts)
        if value is not None and not isinstance(value, str):
            raise UsageError(f"{self.where}: content must be a string, found {type(value).__name__}.")
        if value is not None:
            whole(value, self.row, self.column)
        return value

    def _learnt(self, said: Mapping[str, object], role: str) -> bool:
        for key in _LEARNT:
            if key in said:
                if said[key] not in (0, 1):  # of these are False and True
                    raise UsageError(f'{self.where}: "{key}" must be 0 or 1, found {str(said[key])[:20]}.')
                if said[key] and role != "assistant":
                    raise UsageError(f'{self.where}: "{key}" is 1 in a turn of {role}; only the assistant is learnt.')
                return bool(said[key])
        return True

    def _calls(self, calls: object) -> list[dict[str, object]]:
        """Tool calls as chat templates take them: arguments are objects, even if the data has them as JSON strings."""
        if isinstance(calls, str):
            calls = parsed(self.row, self.column, calls)
        found = []
        for call in calls if isinstance(calls, list) else [calls]:
            given = call if isinstance(call, dict) else {}
            function = given.get("function", call)
            if not isinstance(function, dict) or not isinstance(function.get("name"), str):
                raise UsageError(f'{self.where}: a tool call has "name" and "arguments", found {quoted(call)}.')
            arguments = function.get("arguments", function.get("parameters", {}))
            if isinstance(arguments, str):
                arguments = parsed(self.row, self.column, arguments or "{}")
            made = {"type": "function", "function": {"name": function["name"], "arguments": arguments}}
            found.append(made | ({"id": given["id"]} if isinstance(given.get("id"), str) else {}))
        return found


def whole(text: str, row: Row, column: str) -> str:
    """Raises UsageError for half of a surrogate pair, such as half an emoji, which no tokenizer accepts."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        half = ascii(text[error.start])
        raise UsageError(f'data {row.place}: "{column}" has half of a surrogate pair, {half}. Remove it.') from None
    return text
