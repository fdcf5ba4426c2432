"""The formats of data: the columns that each needs and reads, and its conversion of a row into a sample.

A row's format is the one that reads most of its columns. A column that some format reads and this one does not may say
how the row is meant (a label, a system prompt, a rejected answer): it is refused. Others are named in a note.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from finetune.data.contents import (
    Content,
    Conversation,
    Instruction,
    Judged,
    Labelled,
    Preference,
    Text,
    TextPair,
    Turn,
    Turns,
)
from finetune.data.files import Row
from finetune.data.preferences import answers
from finetune.data.turns import read_tools, read_turns, whole
from merge.errors import UsageError


@dataclass(frozen=True)
class Format:
    """One format.

    Attributes:
        needs: columns; "a|b" means either.
        may: columns that it reads if they exist.
        repeats: columns of public data sets that repeat what is read; a note names them.
        about: what the columns hold, for the documents.
    """

    name: str
    needs: tuple[str, ...]
    may: tuple[str, ...]
    read: Callable[[Row], Content]
    repeats: tuple[str, ...] = ()
    about: str = ""

    @property
    def columns(self) -> tuple[str, ...]:
        """All columns that it reads."""
        return tuple(part for column in self.needs for part in column.split("|")) + self.may

    def fits(self, row: Row, known: Callable[[Row, str], bool] = lambda row, column: column in row.columns) -> bool:
        return all(any(known(row, part) for part in column.split("|")) for column in self.needs)

    def check(self, row: Row) -> None:
        """Raises UsageError for a row that lacks columns of the format, which was detected from the first row."""
        for need in self.needs:
            if not any(column in row.columns for column in need.split("|")):
                lacking = need.partition("|")[0]
                raise UsageError(f'data {row.place}: no column "{lacking}"; found: {names(row.columns)}.')


def there(row: Row, column: str) -> bool:
    """Whether the column has a value; columnar files have null in rows without one."""
    return row.columns.get(column) is not None


def has(row: Row, column: str) -> bool:
    """Whether the column has a value that is not empty."""
    return row.columns.get(column) not in (None, [], "")


def detect(row: Row) -> Format:
    """The format that reads most of the columns. Raises UsageError if there is none."""
    fitting = [form for form in FORMATS.values() if form.fits(row, there)]
    if fitting := fitting or [form for form in FORMATS.values() if form.fits(row)]:
        return max(fitting, key=lambda form: sum(there(row, column) for column in set(form.columns)))
    raise UsageError(
        f"data {row.place}: cannot tell the format from the columns {names(row.columns)}. Give templates, for example "
        'prompt: "Q: {question}\\nA: " and completion: "{answer}", or rename columns: '
        + "; ".join(f"{form.name} has {' + '.join(form.needs)}" for form in FORMATS.values())
        + "."
    )


def unread(form: Format, row: Row) -> list[str]:
    """Columns with values that are not read. Raises UsageError for one that may change the row's meaning."""
    left = [column for column in row.columns if column not in form.columns and has(row, column)]
    if lost := [column for column in left if column in MEANT and column not in form.repeats]:
        raise UsageError(
            f"data {row.place}: format {form.name} does not read {names(lost)}, which may change the meaning "
            f"of the row. Remove {'it' if len(lost) == 1 else 'them'}, name another format, or set "
            f"ignore_columns: [{names(lost)}]."
        )
    return left


def names(columns: Iterable[str]) -> str:
    return ", ".join(str(column)[:40] for column in columns) or "none"


def text_of(row: Row, *columns: str) -> str:
    """The first of the columns that exists, as text; numbers and booleans are converted."""
    column = next((column for column in columns if column in row.columns), columns[0])
    if column not in row.columns:
        raise UsageError(f'data {row.place}: no column "{column}"; found: {names(row.columns)}.')
    value = row.columns[column]
    if isinstance(value, (str, bool, int, float)):
        return whole(str(value), row, column)
    found = {type(None): "nothing", dict: "an object"}.get(type(value), f"a {type(value).__name__}")
    raise UsageError(f'data {row.place}: "{column}" must be a string, found {found}.')


def _optional(row: Row, column: str) -> str:
    return text_of(row, column) if has(row, column) else ""


def with_system(row: Row, turns: Turns) -> Turns:
    """Puts the column "system" first. Raises UsageError if the conversation has another system prompt."""
    system = _optional(row, "system")
    if not system:
        return turns
    if turns and turns[0].role in ("system", "developer"):
        if turns[0].content == system:
            return turns
        raise UsageError(f'data {row.place}: the column "system" and the first turn are different system prompts.')
    return (Turn("system", system), *turns)


def _conversation(column: str) -> Callable[[Row], Content]:
    def read(row: Row) -> Content:
        turns = with_system(row, read_turns(row, column))
        if not any(turn.role == "assistant" and turn.learnt for turn in turns):
            raise UsageError(f'data {row.place}: "{column}" has no turn of the assistant that is learnt.')
        return Conversation(turns, read_tools(row))

    return read


def _alpaca(row: Row) -> Instruction:
    history = row.columns.get("history") or []
    if not isinstance(history, list) or not all(
        isinstance(pair, (list, tuple)) and len(pair) == 2 and all(isinstance(text, str) for text in pair)
        for pair in history
    ):
        raise UsageError(f'data {row.place}: "history" must be a list of [instruction, output].')
    before = tuple((whole(said, row, "history"), whole(answer, row, "history")) for said, answer in history)
    fields = text_of(row, "instruction"), _optional(row, "input"), text_of(row, "output")
    return Instruction(*fields, _optional(row, "system"), before)


def _prompt_completion(row: Row) -> Content:
    columns = ("completion", "response", "answer")
    answer = next((column for column in columns if there(row, column)), columns[0])
    if isinstance(row.columns.get("prompt"), list) or isinstance(row.columns.get(answer), list):
        prompt, completion = _sides(row, answer)
        if not any(turn.role == "assistant" and turn.learnt for turn in completion):
            raise UsageError(f'data {row.place}: "{answer}" has no turn of the assistant that is learnt.')
        asked = tuple(Turn(turn.role, turn.content, False, turn.more) for turn in prompt)
        return Conversation((*with_system(row, asked), *completion), read_tools(row))
    if has(row, "system") or has(row, "tools"):
        turns = (Turn("user", text_of(row, "prompt")), Turn("assistant", text_of(row, answer)))
        return Conversation(with_system(row, turns), read_tools(row))
    return TextPair(text_of(row, "prompt"), text_of(row, answer))


def _sides(row: Row, answer: str) -> tuple[Turns, Turns]:
    """Prompt and answer as turns; a string is the user's, or the assistant's."""
    found = []
    for column, role in (("prompt", "user"), (answer, "assistant")):
        listed = isinstance(row.columns.get(column), list)
        found.append(read_turns(row, column) if listed else (Turn(role, text_of(row, column)),))
    return found[0], found[1]


def _judged(row: Row) -> Content:
    label = "kto_tag" if has(row, "kto_tag") else "label"
    value = row.columns.get(label)
    if isinstance(value, str) and value.lower() in ("true", "false"):
        value = value.lower() == "true"
    if value not in (True, False):  # also 1 and 0
        raise UsageError(f'data {row.place}: "{label}" must be true or false, found {str(value)[:20]}.')
    column = next((column for column in ("messages", "conversations") if has(row, column)), None)
    if column is not None:
        turns = with_system(row, read_turns(row, column))
        if turns[-1].role != "assistant":
            raise UsageError(f'data {row.place}: "{column}" must end with the answer that is judged.')
        return Judged(turns[:-1], turns[-1:], bool(value), read_tools(row))
    if there(row, "instruction"):  # LLaMA-Factory's
        return Judged(_alpaca(row).question, text_of(row, "output"), bool(value))
    answer = "completion" if there(row, "completion") else "response"
    if isinstance(row.columns.get("prompt"), list) or isinstance(row.columns.get(answer), list):
        prompt, completion = _sides(row, answer)
        return Judged(with_system(row, prompt), completion, bool(value), read_tools(row))
    return Judged(text_of(row, "prompt"), text_of(row, answer), bool(value))


def _preference(row: Row) -> Content:
    prompt, chosen, rejected = answers(row)
    if isinstance(prompt, str):
        if not (has(row, "system") or has(row, "tools")):
            return Preference(prompt, chosen, rejected)
        prompt = (Turn("user", prompt),)
        chosen, rejected = (
            (Turn("assistant", text),) if isinstance(text, str) else text for text in (chosen, rejected)
        )
    return Preference(with_system(row, prompt), chosen, rejected, read_tools(row))


def _anchor(row: Row) -> Content:
    """A pair of matching texts, with one that does not match the first, if given."""
    anchor, positive = text_of(row, "anchor", "query"), text_of(row, "positive")
    if has(row, "negative"):
        return Preference(anchor, positive, text_of(row, "negative"))
    return TextPair(anchor, positive)


_TALK = ("system", "tools")
FORMATS: dict[str, Format] = {
    form.name: form
    for form in (
        Format(
            *("messages", ("messages",), _TALK, _conversation("messages")),
            about="OpenAI's turns: role, content, tool_calls, tool_call_id, name, weight",
        ),
        Format(
            *("sharegpt", ("conversations",), _TALK, _conversation("conversations")),
            about="turns with from and value; from human, gpt, system, function_call, observation",
        ),
        Format(
            "preference",
            ("chosen", "rejected"),
            ("prompt", "question", "instruction", "input", "history", "messages", "conversations", *_TALK),
            _preference,
            about="texts with a prompt, transcripts (HH), or turns (UltraFeedback, TRL)",
        ),
        Format(
            "kto",
            ("completion|response|output|messages|conversations", "label|kto_tag"),
            ("prompt", "instruction", "input", *_TALK),
            _judged,
            about="an answer, and whether it is wanted: true or false",
        ),
        Format(
            "anchor_positive",
            ("anchor|query", "positive"),
            ("negative",),
            _anchor,
            about="texts that match, and one that does not",
        ),
        Format(
            "alpaca",
            ("instruction", "output"),
            ("input", "system", "history"),
            _alpaca,
            ("text",),
            "an instruction with its answer",
        ),
        Format(
            "prompt_completion",
            ("prompt", "completion|response|answer"),
            _TALK,
            _prompt_completion,
            about="texts or turns",
        ),
        Format(
            "text_label",
            ("text|sentence", "label"),
            (),
            lambda row: Labelled(text_of(row, "text", "sentence"), text_of(row, "label")),
            about="a text and its class",
        ),
        Format("text", ("text",), (), lambda row: Text(text_of(row, "text")), about="a text to continue"),
    )
}
# Columns that affect the meaning of a row: those that some format reads, and some that none does.
MEANT = {column for form in FORMATS.values() for column in form.columns} | {
    *("functions", "function_call", "chat_template_kwargs", "images", "image", "videos", "audios", "audio"),
    *("weight", "train", "thinking", "reasoning", "reasoning_content", "negatives", "demos"),
}
