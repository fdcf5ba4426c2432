"""Generates text with a model, a piece at a time."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from merge.errors import UsageError, first_line
from merge.tools.loaded import OpenedModel


@dataclass(frozen=True)
class Sampling:
    """`temperature` 0: always the most likely token. `top_k` 0 and `top_p` 1: no cut. `max_tokens` None: 256, or the
    number of the model's positions."""

    max_tokens: int | None = None
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int = 0
    stop: tuple[str, ...] = ()


def as_chat(loaded: OpenedModel, messages: Sequence[dict[str, str]]) -> str:
    """Messages of role and content -> the prompt in the model's chat template.

    Raises:
        UsageError: the tokenizer has no chat template, or the template refuses the messages.
    """
    if not loaded.tokenizer.chat_template:
        raise UsageError(
            f"{loaded.name}: its tokenizer has no chat template. Leave out --chat and give the whole prompt."
        )
    try:
        text: str = loaded.tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=True)
    except Exception as error:  # templates raise what they like
        raise UsageError(f"{loaded.name}: its chat template refuses these messages ({first_line(error)}).") from error
    return text


def generate(loaded: OpenedModel, prompt: str, sampling: Sampling, templated: bool = False) -> Iterator[str]:
    """Yields pieces of the continuation; joined, they are the whole text without the stop text.

    Args:
        templated: the prompt is `as_chat`'s, which has its special tokens already.

    Raises:
        UsageError: the prompt is empty, or longer than the model's positions.
    """
    import threading

    import torch
    from transformers import TextIteratorStreamer

    tokenizer, network = loaded.tokenizer, loaded.network
    tokens = tokenizer(prompt, return_tensors="pt", add_special_tokens=not templated)
    n_tokens = tokens["input_ids"].shape[1]
    if n_tokens == 0:
        raise UsageError("--prompt: expected some text, found none.")
    most = getattr(network.config.get_text_config(), "max_position_embeddings", None)
    room = most - n_tokens if most is not None else None
    if room is not None and room < (sampling.max_tokens or 1):
        asked = (
            f" and --max-tokens is {sampling.max_tokens:,}" if sampling.max_tokens else ", which leaves none to write"
        )
        raise UsageError(
            f"{loaded.name}: has {most:,} positions; the prompt has {n_tokens:,} tokens{asked}. Give fewer."
        )
    streamer = TextIteratorStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    settings: dict[str, Any] = {
        "max_new_tokens": sampling.max_tokens or min(256, room or 256),
        "do_sample": sampling.temperature > 0,
        "pad_token_id": tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id,
    }
    if sampling.temperature > 0:
        settings |= {"temperature": sampling.temperature, "top_p": sampling.top_p, "top_k": sampling.top_k}
    else:  # sampling settings of generation_config.json would cause a warning
        settings |= {"temperature": None, "top_p": None, "top_k": None}
    failure: list[BaseException] = []
    enough = threading.Event()

    def work() -> None:
        try:
            torch.manual_seed(sampling.seed)
            with torch.inference_mode():
                network.generate(
                    input_ids=tokens["input_ids"],
                    attention_mask=tokens["attention_mask"],
                    streamer=streamer,
                    stopping_criteria=[lambda ids, scores, **_: torch.full((len(ids),), enough.is_set())],
                    **settings,
                )
        except BaseException as error:  # told where the text is read
            failure.append(error)
            streamer.end()

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    try:
        yield from _until(streamer, sampling.stop)
    finally:
        enough.set()
        thread.join()
    if failure:
        raise failure[0]


def _until(pieces: Iterator[str], stops: Sequence[str]) -> Iterator[str]:
    """Pieces up to the first stop text; a possible beginning of one is held back until it is decided."""
    held = ""
    for piece in pieces:
        held += piece
        found = [place for stop in stops if (place := held.find(stop)) >= 0]
        if found:
            if min(found):
                yield held[: min(found)]
            return
        safe = len(held) - max((_overlap(held, stop) for stop in stops), default=0)
        if safe:
            yield held[:safe]
        held = held[safe:]
    if held:
        yield held


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that is a beginning of `stop`."""
    return next((n for n in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:n])), 0)
