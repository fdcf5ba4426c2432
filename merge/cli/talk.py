"""merge generate without a prompt: a conversation in a terminal."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING

import click

from merge.cli.models import write

if TYPE_CHECKING:
    from merge.tools.generate import Sampling
    from merge.tools.loaded import OpenedModel


def talk(loaded: OpenedModel, sampling: Sampling, first: list[dict[str, str]], chat: bool | None) -> None:
    """Lines and answers until the end of the input.

    Args:
        first: the system message, if there is one.
        chat: by the chat template, with all that was said before, or each line continued on its own; None: as the
            tokenizer has a template, or a system message asks for one.

    Raises:
        UsageError: the template is missing, or refuses the system message.
    """
    from merge.errors import UsageError
    from merge.tools.generate import as_chat

    with contextlib.suppress(ImportError):  # not on Windows
        import readline  # noqa: F401  # input() edits lines and remembers them with it
    chat = bool(first or loaded.tokenizer.chat_template) if chat is None else chat
    if chat:
        as_chat(loaded, [*first, {"role": "user", "content": "?"}])
    how = "/new starts over" if chat else "each line is continued on its own"
    click.echo(f"Ctrl-C stops an answer, Ctrl-D ends; {how}.", err=True)
    messages = list(first)
    while (text := _line()) is not None:
        if chat and text.strip() == "/new":
            messages = list(first)
        if not text.strip() or (chat and text.strip() == "/new"):
            continue
        turn = {"role": "user", "content": text}
        pieces: list[str] = []
        try:
            for piece in write(loaded, [*messages, turn] if chat else text, sampling, show=True):
                pieces.append(piece)  # noqa: PERF402  # what came before Ctrl-C is kept
        except KeyboardInterrupt:
            click.echo()
        except UsageError as error:  # too long for the model, as a rule
            click.echo(f"{error}{' /new starts over.' if chat else ''}", err=True)
            continue
        messages += [turn, {"role": "assistant", "content": "".join(pieces)}]


def _line() -> str | None:
    """What is typed next; None at the end of the input."""
    while True:
        try:
            return input("> ")
        except KeyboardInterrupt:  # clears the line
            click.echo()
        except EOFError:
            click.echo()
            return None
