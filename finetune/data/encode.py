"""Encodes samples as token ids, each with the weight of its loss.

A text is tokenised in one piece, as a model reads it, and cut into prompt and response by character offsets; a token
that lies in both counts as response. Chat templates are rendered once for each turn, so what counts as the assistant's
is what the template adds for that turn, its end mark included.
"""

from __future__ import annotations

import bisect
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from finetune.data.contents import Conversation, Turns
from finetune.data.turns import REASONING
from finetune.keys import Config
from merge.errors import UsageError
from merge.jsontext import parse_json

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True, slots=True)
class Example:
    """One sequence. ids (token,) int32; weights (token,) float32: of the loss of this token, 0 for the first.

    starts: where further sequences begin, of an example that compares several.
    targets: (token,) int32, the token to predict at each position, if not the next one.
    label: the class of the whole text.
    """

    ids: NDArray[np.int32]
    weights: NDArray[np.float32]
    place: str
    task: str | None = None
    starts: tuple[int, ...] = ()
    targets: NDArray[np.int32] | None = None
    label: int | None = None

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def sequences(self) -> list[tuple[NDArray[np.int32], NDArray[np.float32]]]:
        """(ids, weights) of each sequence."""
        ends = (*self.starts, len(self.ids))
        return [(self.ids[a:b], self.weights[a:b]) for a, b in zip((0, *self.starts), ends, strict=True)]

    @property
    def longest(self) -> int:
        """Tokens of the longest sequence."""
        return max(len(ids) for ids, _ in self.sequences)


Encoded = tuple[NDArray[np.int32], NDArray[np.float32]]  # ids and weights of a sequence


@dataclass(frozen=True, slots=True)
class Segment:
    """A piece of text. `learnt`: 1 for text that the model should write, else the weight of the prompt."""

    text: str
    learnt: float


class Encoder:
    """A tokenizer with the settings of one run."""

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, config: Config, max_length: int, held_out: bool = False
    ) -> None:
        """`held_out`: validation, which measures responses only, so that losses are comparable between settings."""
        self.tokenizer, self.config, self.max_length, self.held_out = tokenizer, config, max_length, held_out
        self.prompt_weight = 0.0 if held_out else config.prompt_loss_weight
        self.straddling = 0  # samples with a token that contains the end of the prompt and the start of the response
        self.dropped = self.cut = 0  # samples that were too long

    def pair(self, prompt: str, completion: str) -> Encoded:
        """prompt + completion + end mark."""
        return self.segments([Segment(prompt, self.prompt_weight), Segment(completion, 1.0)], special=True)

    def text(self, text: str) -> Encoded:
        return self.segments([Segment(text, 1.0)], special=True)

    def bare(self, text: str) -> list[int]:
        """Token ids of a piece of text, without special tokens."""
        return list(self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])

    @property
    def opening(self) -> list[int]:
        """The token that the tokenizer adds before every text, if any."""
        first = list(self.tokenizer("", add_special_tokens=True)["input_ids"][:1])
        return first if first == [self.tokenizer.bos_token_id] else []

    def marked(self, text: str, too_long: str) -> NDArray[np.int32] | None:
        """A whole text with the tokenizer's own marks and no end mark; None if it is dropped as too long."""
        ids = self.tokenizer(text, verbose=False)["input_ids"]
        if len(ids) > self.max_length and too_long == "drop":
            self.dropped += 1
            return None
        if len(ids) > self.max_length and too_long == "truncate":
            self.cut += 1
            ids = self.tokenizer(text, truncation=True, max_length=self.max_length)["input_ids"]
        return np.array(ids, np.int32)

    def pieces(self, text: str, length: int) -> list[str]:
        """The text in parts of at most `length` tokens each."""
        if not self.tokenizer.is_fast:
            ids = self.bare(text)
            return [self.tokenizer.decode(ids[at : at + length]) for at in range(0, len(ids), length)]
        found = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        starts = [start for start, _ in found["offset_mapping"]][::length]
        ends = [*starts[1:], len(text)]
        return [text[a:b] for a, b in zip([0, *starts[1:]], ends, strict=True) if b > a]

    def chunks(self, text: str, too_long: str) -> list[tuple[NDArray[np.int32], list[int | None]]]:
        """(ids, words) of the text, each part with the tokenizer's own marks; words (token,): the number of the word a
        token is of, None for marks."""
        room = self.max_length - len(self.tokenizer("", add_special_tokens=True)["input_ids"])
        whole = self.bare(text)
        pieces = [text]
        if len(whole) > room and too_long == "drop":
            self.dropped += 1
            return []
        if len(whole) > room and too_long in ("truncate", "split"):
            pieces = self.pieces(text, room)
        if too_long == "truncate" and len(pieces) > 1:
            self.cut += 1
            pieces = pieces[:1]
        found = []
        for piece in pieces:
            more = {} if too_long == "error" else {"truncation": True, "max_length": self.max_length}
            coded = self.tokenizer(piece, return_special_tokens_mask=True, verbose=False, **more)
            marks = coded["special_tokens_mask"]
            words = coded.word_ids() if self.tokenizer.is_fast else list(range(len(marks)))
            words = [None if mark else word for mark, word in zip(marks, words, strict=True)]
            if any(word is not None for word in words):
                found.append((np.array(coded["input_ids"], np.int32), words))
        return found

    def answer(self, before: Turns, answer: Turns, tools: str, place: str) -> Encoded:
        """A conversation in which only the assistant's turns in `answer` count."""
        before = tuple(replace(turn, learnt=False) for turn in before)
        segments = self.turns(Conversation((*before, *answer), tools), place)
        return self.segments([replace(one, learnt=float(one.learnt >= 1)) for one in segments], special=False)

    def conversation(self, conversation: Conversation, place: str) -> Encoded:
        return self.segments(self.turns(conversation, place), special=False)

    def turns(self, conversation: Conversation, place: str) -> list[Segment]:
        """The rendered conversation, cut where the assistant's turns begin and end.

        Raises:
            UsageError: the template rewrites earlier turns, so the turns cannot be told apart.
        """
        turns = conversation.turns
        whole = self._checked(conversation, place)
        answers = [i for i, turn in enumerate(turns) if turn.role == "assistant"]
        learnt = [i for i in answers if turns[i].learnt]
        learnt = learnt[-1:] if self.config.last_turn_only else learnt
        segments, end = [], 0
        for i in answers:
            if i not in learnt and turns[i].learnt:
                continue  # an earlier answer, which is part of the prompt
            before, after = self._around(conversation, i, place)
            if not (whole.startswith(after) and after.startswith(before)):
                raise UsageError(
                    f"data {place}: the chat template writes turn {i + 1} otherwise when turns follow, so its "
                    "tokens cannot be identified. Set last_turn_only: true, or give another chat_template."
                )
            segments += [
                Segment(whole[end : len(before)], self.prompt_weight),
                Segment(after[len(before) :], float(i in learnt)),
            ]
            end = len(after)
        return [segment for segment in (*segments, Segment(whole[end:], self.prompt_weight)) if segment.text]

    def _around(self, conversation: Conversation, i: int, place: str) -> tuple[str, str]:
        """The text before turn i, with the opening of an answer, and the text with the turn."""
        until = replace(conversation, turns=conversation.turns[:i])
        before = self.render(until, place, prompt=True) if i else ""
        after = self.render(replace(conversation, turns=conversation.turns[: i + 1]), place)
        if not after.startswith(before):  # some templates open an answer with text that they do not keep
            before = self.render(until, place)
        return before, after

    def _checked(self, conversation: Conversation, place: str) -> str:
        """The rendered conversation. Raises UsageError if the template leaves out a part of the data."""
        text = self.render(conversation, place)
        for number, turn in enumerate(conversation.turns, 1):
            more = turn.as_message()
            said = [turn.content] if turn.role != "assistant" else []  # templates take reasoning out of answers
            said += [call["function"]["name"] for call in more.get("tool_calls", ())]
            if number == len(conversation.turns):
                said += [more[name] for name in REASONING if name in more]
            for part in said:
                if part and part.strip() not in text:
                    raise UsageError(
                        f'data {place}: the chat template leaves out "{part.strip()[:40]}" of turn {number} '
                        f"({turn.role}). Remove it from the data, or give a chat_template that writes it."
                    )
        if conversation.tools and text == self.render(replace(conversation, tools=""), place):
            raise UsageError(
                f"data {place}: the chat template does not support tools. Remove the column, or give another "
                "chat_template."
            )
        return text

    def render(self, conversation: Conversation, place: str, prompt: bool = False) -> str:
        """The conversation in the chat template. `prompt`: with the opening of an answer.

        The role "developer" is written as "system" by templates that do not know it.
        """
        messages = [turn.as_message() for turn in conversation.turns]
        if "developer" not in str(self.tokenizer.chat_template):
            messages = [one | {"role": "system"} if one["role"] == "developer" else one for one in messages]
        tools = parse_json(conversation.tools) if conversation.tools else None
        try:
            text: str = self.tokenizer.apply_chat_template(
                messages, tools=tools, tokenize=False, add_generation_prompt=prompt
            )
        except Exception as error:  # any error of a template: jinja's, or its own raise_exception
            raise UsageError(f"data {place}: the chat template rejects this conversation ({error}).") from None
        return text

    def segments(self, segments: Sequence[Segment], special: bool) -> Encoded:
        """(ids, weights) of the joined text; `special`: with the tokenizer's own marks and an end mark."""
        if self.tokenizer.is_fast:
            ids, weights = self._by_offsets(segments, special)
        else:
            ids, weights = [], []
            for i, segment in enumerate(segments):
                piece = self.tokenizer(segment.text, add_special_tokens=special and i == 0)["input_ids"]
                ids += piece
                weights += [segment.learnt] * len(piece)
        eos = self.tokenizer.eos_token_id
        if special and eos is not None and (not ids or ids[-1] != eos):
            ids.append(eos)
            weights.append(segments[-1].learnt)
        found = np.array(weights, np.float32)
        found[:1] = 0  # no token precedes the first one to predict it
        return np.array(ids, np.int32), found

    def _by_offsets(self, segments: Sequence[Segment], special: bool) -> tuple[list[int], list[float]]:
        text = "".join(segment.text for segment in segments)
        found = self.tokenizer(text, add_special_tokens=special, return_offsets_mapping=True, verbose=False)
        bounds, end = [], 0
        for segment in segments:
            end += len(segment.text)
            bounds.append(end)
        weights: list[float] = []
        straddles = False
        for start, stop in found["offset_mapping"]:
            if stop <= start:  # a mark of the tokenizer's own: of what is before it, if anything is
                weights.append(weights[-1] if weights else segments[0].learnt)
                continue
            first, last = bisect.bisect_right(bounds, start), bisect.bisect_right(bounds, stop - 1)
            straddles |= last > first
            weights.append(max(segment.learnt for segment in segments[first : last + 1]))
        self.straddling += straddles
        return list(found["input_ids"]), weights

    def fit(
        self, ids: NDArray[np.int32], weights: NDArray[np.float32], place: str, task: str | None, too_long: str
    ) -> list[Example]:
        """The sequence; if it is too long for the context, cut, dropped or split as the config says."""
        length = self.max_length
        if len(ids) <= length or too_long == "error":  # an error is raised later, for all examples at once
            return [Example(ids, weights, place, task)]
        if too_long == "drop":
            self.dropped += 1
            return []
        if too_long == "truncate":
            self.cut += 1
            return [Example(ids[:length], weights[:length], place, task)]
        parts = []
        for start in range(0, len(ids), length):
            part = weights[start : start + length].copy()
            part[:1] = 0
            if len(part) > 1:
                parts.append(Example(ids[start : start + length], part, place, task))
        return parts
