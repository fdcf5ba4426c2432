"""Contents of samples: conversations, completions, texts, preferences and labels, in one form for all formats."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from merge.jsontext import parse_json


@dataclass(frozen=True, slots=True)
class Turn:
    """One turn of a conversation.

    Attributes:
        content: None if the assistant only calls tools.
        learnt: whether it counts in the loss; of the assistant's turns only.
        more: JSON of the other keys that chat templates read: tool_calls, name, tool_call_id, reasoning_content,
            thinking.
    """

    role: str
    content: str | None
    learnt: bool = True
    more: str = ""

    def as_message(self) -> dict[str, Any]:
        """The turn as a message for chat templates."""
        return {"role": self.role, "content": self.content} | (parse_json(self.more) if self.more else {})


Turns = tuple[Turn, ...]


@dataclass(frozen=True, slots=True)
class Conversation:
    """Turns of system, user, assistant and tool; the assistant's are learnt. `tools`: JSON of their schemas."""

    turns: Turns
    tools: str = ""


@dataclass(frozen=True, slots=True)
class TextPair:
    prompt: str
    completion: str


@dataclass(frozen=True, slots=True)
class Instruction:
    """A row of the Alpaca format: a turn in a chat template, or the Alpaca scaffold if there is no template.

    history: (instruction, output) of earlier turns.
    """

    instruction: str
    input: str
    output: str
    system: str = ""
    history: tuple[tuple[str, str], ...] = ()

    @property
    def question(self) -> str:
        return self.instruction + (f"\n{self.input}" if self.input else "")


@dataclass(frozen=True, slots=True)
class Text:
    text: str


@dataclass(frozen=True, slots=True)
class Preference:
    """A better and a worse answer to a prompt, as texts or as turns."""

    prompt: str | Turns
    chosen: str | Turns
    rejected: str | Turns
    tools: str = ""


@dataclass(frozen=True, slots=True)
class Judged:
    """An answer that is wanted, or not (KTO). `foreign`: an answer to another prompt."""

    prompt: str | Turns
    completion: str | Turns
    wanted: bool
    tools: str = ""
    foreign: str | Turns = ""


@dataclass(frozen=True, slots=True)
class Labelled:
    text: str
    label: str


Content = Conversation | TextPair | Instruction | Text | Preference | Judged | Labelled


@dataclass(frozen=True, slots=True)
class Sample:
    place: str
    task: str | None
    content: Content
