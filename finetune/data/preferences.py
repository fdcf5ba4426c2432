"""Reads preferences, a better and a worse answer, from the layouts of public data sets.

Strings with a prompt; transcripts of "Human:" and "Assistant:" (Anthropic's HH); whole conversations that part
somewhere (UltraFeedback); one answer each after a conversation, and Alpaca's columns before it (LLaMA-Factory).
"""

from __future__ import annotations

import re
from typing import Any

from finetune.data.contents import Turn, Turns
from finetune.data.files import Row
from finetune.data.turns import read_turns, whole
from merge.errors import UsageError

_SPEAKER = re.compile(r"\n\n(Human|Assistant): ?")
Answers = tuple[str | Turns, str | Turns, str | Turns]  # prompt, chosen, rejected: all texts, or all turns


def answers(row: Row) -> Answers:
    """prompt, chosen and rejected of a row. Raises UsageError if they do not match."""
    chosen, rejected = row.columns["chosen"], row.columns["rejected"]
    if isinstance(chosen, str) != isinstance(rejected, str):
        raise _wrong(row, '"chosen" and "rejected" are of different kinds, a text and turns')
    if isinstance(chosen, str):
        return _texts(row, chosen, rejected)
    return _turns(row, read_turns(row, "chosen"), read_turns(row, "rejected"))


def _texts(row: Row, chosen: str, rejected: str) -> Answers:
    for column, text in (("chosen", chosen), ("rejected", rejected)):
        whole(text, row, column)
    before = _before(row)
    if before is None and chosen.startswith("\n\nHuman:") and rejected.startswith("\n\nHuman:"):
        return _parted(row, _transcript(chosen), _transcript(rejected))
    if before is None:
        raise _wrong(row, 'no column "prompt", and "chosen" and "rejected" are not transcripts of Human and Assistant')
    if isinstance(before, str):
        return before, chosen, rejected
    return before, (Turn("assistant", chosen),), (Turn("assistant", rejected),)


def _turns(row: Row, chosen: Turns, rejected: Turns) -> Answers:
    before = _before(row, messages=False)
    _same_as_chosen(row, chosen)
    if before is None:
        return _parted(row, chosen, rejected)
    asked = (Turn("user", before),) if isinstance(before, str) else before
    if chosen[0].role == rejected[0].role == "assistant":
        return asked, chosen, rejected
    prompt, *both = _parted(row, chosen, rejected)
    said = [turn.content for turn in prompt if isinstance(turn, Turn) and turn.role not in ("system", "developer")]
    if said != [turn.content for turn in asked if turn.role not in ("system", "developer")]:
        raise _wrong(row, '"chosen" and "rejected" do not begin with the column "prompt"')
    return prompt, both[0], both[1]


def _same_as_chosen(row: Row, chosen: Turns) -> None:
    """Checks that "messages" repeats the chosen conversation, as in UltraFeedback; otherwise it would be lost."""
    if row.columns.get("messages") and read_turns(row, "messages") != chosen:
        raise _wrong(row, 'the column "messages" is not the chosen conversation, so it would be lost; remove it')


def _before(row: Row, messages: bool = True) -> str | Turns | None:
    """The prompt, from whichever column holds it; None if there is none."""
    columns = row.columns
    found: list[str | Turns] = []
    for name in ("prompt", "question"):
        if columns.get(name):
            value: Any = columns[name]
            found.append(whole(value, row, name) if isinstance(value, str) else read_turns(row, name))
    if columns.get("instruction"):
        found.append(_instruction(row))
    talks = ("conversations", "messages") if messages else ("conversations",)
    found += [read_turns(row, name) for name in talks if columns.get(name)]
    if len(found) > 1:
        raise _wrong(
            row, "several columns contain the prompt; keep one of prompt, question, instruction, conversations"
        )
    return found[0] if found else None


def _instruction(row: Row) -> str | Turns:
    """Alpaca's columns: instruction, input, history."""
    text = str(row.columns["instruction"])
    if row.columns.get("input"):
        text += f"\n{row.columns['input']}"
    before = [
        Turn(role, str(said))
        for pair in row.columns.get("history") or []
        for role, said in zip(("user", "assistant"), pair, strict=True)
    ]
    return (*before, Turn("user", whole(text, row, "instruction"))) if before else whole(text, row, "instruction")


def _transcript(text: str) -> Turns:
    parts = _SPEAKER.split(text)[1:]
    return tuple(
        Turn("user" if speaker == "Human" else "assistant", said)
        for speaker, said in zip(parts[::2], parts[1::2], strict=True)
    )


def _parted(row: Row, chosen: Turns, rejected: Turns) -> tuple[Turns, Turns, Turns]:
    """The turns that both share at the beginning, and the rest of each, which begins with an answer."""
    same = 0
    for one, other in zip(chosen, rejected, strict=False):
        if one != other:
            break
        same += 1
    same = min(same, len(chosen) - 1, len(rejected) - 1)  # equal answers are refused later, by name
    if chosen[same].role != "assistant" or rejected[same].role != "assistant":
        raise _wrong(row, f'"chosen" and "rejected" part at turn {same + 1}, which is not the assistant\'s in both')
    return chosen[:same], chosen[same:], rejected[same:]


def _wrong(row: Row, why: str) -> UsageError:
    return UsageError(f"data {row.place}: {why}.")
