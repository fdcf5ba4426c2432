"""Decides which samples go into the chat template: conversations always, texts if the config says so.

Rows of the Alpaca format go there if the tokenizer has a template, and are written out with its scaffold if not; a note
says which.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from finetune.data.contents import Content, Conversation, Instruction, Judged, Preference, Sample, TextPair, Turn, Turns
from finetune.keys import Config
from merge.errors import UsageError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# The prompt of Taori et al. 2023 (Stanford Alpaca) without its preamble.
ALPACA = "### Instruction:\n{instruction}\n\n### Response:\n"
ALPACA_INPUT = "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:\n"


def settle(
    samples: Sequence[Sample], config: Config, tokenizer: PreTrainedTokenizerBase, notes: list[str]
) -> list[Sample]:
    """Samples in their final form: no Instruction is left, and texts for the chat template become turns.

    Raises:
        UsageError: conversations, and a tokenizer without a chat template.
    """
    chat = tokenizer.chat_template is not None if config.chat is None else config.chat
    if any(isinstance(sample.content, Instruction) for sample in samples):
        how = "the chat template" if chat else 'the "### Instruction:" scaffold'
        notes.append(f"alpaca rows are written in {how}; chat: {str(not chat).lower()} changes that")
    settled = [replace(sample, content=_settle(sample, chat, bool(config.chat))) for sample in samples]
    if tokenizer.chat_template is None and any(map(_talks, settled)):
        raise UsageError(
            "the tokenizer has no chat template, and the data are conversations. "
            "Give one: chat_template: chatml, or a Jinja file."
        )
    return _with_foreign(settled)


def _with_foreign(samples: list[Sample]) -> list[Sample]:
    """With the answer of the next judged example, of the same kind, beside each."""
    found = list(samples)
    for kind in (str, tuple):
        places = [
            place
            for place, sample in enumerate(samples)
            if isinstance(sample.content, Judged) and isinstance(sample.content.completion, kind)
        ]
        if len(places) == 1:
            raise UsageError(f"data {samples[places[0]].place}: kto needs at least two examples, to compare answers.")
        for place, other in zip(places, places[1:] + places[:1], strict=True):
            content, foreign = samples[place].content, samples[other].content
            assert isinstance(content, Judged)
            assert isinstance(foreign, Judged)
            found[place] = replace(samples[place], content=replace(content, foreign=foreign.completion))
    return found


def _talks(sample: Sample) -> bool:
    content = sample.content
    if isinstance(content, (Preference, Judged)):
        return not isinstance(content.prompt, str)
    return isinstance(content, Conversation)


def _settle(sample: Sample, chat: bool, texts_too: bool) -> Content:
    content = sample.content
    if isinstance(content, Instruction):
        return _as_turns(content) if chat else _scaffold(content)
    if not texts_too:
        return content
    if isinstance(content, TextPair):
        return Conversation((*_turn("user", content.prompt), *_turn("assistant", content.completion)))
    if isinstance(content, Preference):
        chosen, rejected = _turn("assistant", content.chosen), _turn("assistant", content.rejected)
        return replace(content, prompt=_turn("user", content.prompt), chosen=chosen, rejected=rejected)
    if isinstance(content, Judged):
        answer = _turn("assistant", content.completion)
        return replace(content, prompt=_turn("user", content.prompt), completion=answer)
    return content


def _turn(role: str, said: str | Turns) -> Turns:
    return (Turn(role, said),) if isinstance(said, str) else said


def _as_turns(content: Instruction) -> Conversation:
    system = _turn("system", content.system) if content.system else ()
    before = [turn for asked, said in content.history for turn in (*_turn("user", asked), *_turn("assistant", said))]
    return Conversation((*system, *before, *_turn("user", content.question), *_turn("assistant", content.output)))


def _scaffold(content: Instruction) -> TextPair:
    """System prompt and earlier turns stand before the scaffold of this turn. Only the last output is learnt."""
    before = f"{content.system}\n\n" if content.system else ""
    before += "".join(ALPACA.format(instruction=asked) + f"{said}\n\n" for asked, said in content.history)
    template = ALPACA_INPUT if content.input else ALPACA
    return TextPair(before + template.format(instruction=content.instruction, input=content.input), content.output)
