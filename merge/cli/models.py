"""Shared by generate and classify: opening the model, reading lines of a file, printing text as it is generated."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from merge.tools.generate import Sampling
    from merge.tools.loaded import OpenedModel


@contextlib.contextmanager
def opened(text: str, kind: str | None = None, say: Callable[[str], None] = lambda text: None) -> Iterator[OpenedModel]:
    """Like load(); a recipe, of one document or several, and a GGUF file are first written to a temporary directory."""
    from eval.models import directory, is_recipe, is_written_first, subjects
    from merge.loading import CAUSAL
    from merge.tools.loaded import load

    kind = kind or CAUSAL
    if not is_written_first(text):
        yield load(text, kind)
        return
    say(f"merging {text}" if is_recipe(text) else f"decoding {text}")
    with directory(subjects([text])[0]) as path:
        yield dataclasses.replace(load(str(path), kind), name=text)


def read_lines(path: Path) -> list[str]:
    """The non-blank lines of a file. Raises UsageError if there are none, or it is not text."""
    from merge.errors import UsageError
    from merge.textfile import read_text

    lines = [line for line in read_text(path, "--file").splitlines() if line.strip()]
    if not lines:
        raise UsageError(f"--file {path}: expected a text in each line, found none.")
    return lines


def write(loaded: OpenedModel, what: list[dict[str, str]] | str, sampling: Sampling, show: bool) -> Iterator[str]:
    """Generates pieces of text after a prompt or messages; `show`: also prints them as they come."""
    from merge.tools.generate import as_chat, generate

    prompt = what if isinstance(what, str) else as_chat(loaded, what)
    for piece in generate(loaded, prompt, sampling, templated=not isinstance(what, str)):
        if show:
            click.echo(piece, nl=False)
        yield piece
    if show:
        click.echo()
