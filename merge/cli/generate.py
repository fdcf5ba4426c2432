"""merge generate"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from finetune.serve import Loaded, Sampling


@click.command(
    "generate",
    epilog="""\b
Examples:
  merge generate merged/mine --prompt "What is a merge?" --chat
  merge generate org/base+org/adapter --file prompts.txt --json
  merge generate merged/mine --chat              a conversation, where stdin is a terminal""",
)
@click.argument("model")
@click.option("--prompt", help="Text to continue, or the first message with --chat.")
@click.option("--file", type=click.Path(path_type=Path), help="A prompt in each line.")
@click.option("--chat/--no-chat", help="Use the model's chat template.")
@click.option("--system", help="System message, with --chat.")
@click.option("--max-tokens", type=click.IntRange(1), default=256, show_default=True, help="New tokens at most.")
@click.option(
    "--temperature", type=click.FloatRange(0), default=0.0, show_default=True, help="0: always the likeliest token."
)
@click.option("--top-p", type=click.FloatRange(0, 1, min_open=True), default=1.0, show_default=True)
@click.option("--top-k", type=click.IntRange(0), default=0, show_default=True, help="0: all tokens.")
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True, help="Of sampling.")
@click.option("--stop", multiple=True, help="Text that ends it; may be given several times.")
@click.option("--stream/--no-stream", default=True, help="Show the text as it comes.")
@click.option("--json", "as_json", is_flag=True, help="A line of JSON for each prompt.")
def command(
    model: str,
    prompt: str | None,
    file: Path | None,
    chat: bool,
    system: str | None,
    max_tokens: int,
    temperature: float,
    top_p: float,
    top_k: int,
    seed: int,
    stop: tuple[str, ...],
    stream: bool,
    as_json: bool,
) -> None:
    """Have MODEL write: a directory, hub id, or model+adapter."""
    from finetune.serve import Sampling, load
    from merge.errors import UsageError

    if prompt is not None and file is not None:
        raise UsageError("--prompt and --file: give one of them.")
    if system is not None and not chat:
        raise UsageError("--system: needs --chat.")
    if "" in stop:
        raise UsageError("--stop: expected some text, found none.")
    prompts = [prompt] if prompt is not None else read_lines(file) if file is not None else None
    if prompts is None and not sys.stdin.isatty():
        raise UsageError("merge generate: expected --prompt or --file. Without them it needs a terminal to talk in.")
    sampling = Sampling(max_tokens, temperature, top_p, top_k, seed, stop)
    loaded = load(model)
    if prompts is None:
        _talk(loaded, sampling, system, chat)
        return
    for text in prompts:
        answer = _answer(loaded, text, sampling, system, chat, stream and not as_json)
        if as_json:
            click.echo(json.dumps({"prompt": text, "text": answer}, ensure_ascii=False))
        elif not stream:
            click.echo(answer)


def read_lines(path: Path) -> list[str]:
    """The lines that are not blank. Raises UsageError if there is none, or the file is no text."""
    from merge.errors import UsageError

    try:
        lines = [line for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"--file {path}: cannot be read as UTF-8 text ({error}).") from None
    if not lines:
        raise UsageError(f"--file {path}: expected a text in each line, found none.")
    return lines


def _answer(loaded: Loaded, text: str, sampling: Sampling, system: str | None, chat: bool, show: bool) -> str:
    messages = ([{"role": "system", "content": system}] if system else []) + [{"role": "user", "content": text}]
    return _say(loaded, messages if chat else text, sampling, show)


def _say(loaded: Loaded, what: list[dict[str, str]] | str, sampling: Sampling, show: bool) -> str:
    """The generated text; `show`: also on stdout, as it comes."""
    from finetune.serve import as_chat, generate

    prompt = what if isinstance(what, str) else as_chat(loaded, what)
    pieces = []
    for piece in generate(loaded, prompt, sampling, templated=not isinstance(what, str)):
        pieces.append(piece)
        if show:
            click.echo(piece, nl=False)
    if show:
        click.echo()
    return "".join(pieces)


def _talk(loaded: Loaded, sampling: Sampling, system: str | None, chat: bool) -> None:
    """A conversation until the end of the input; without a chat template each line is continued on its own."""
    messages = [{"role": "system", "content": system}] if system else []
    click.echo("Ctrl-D ends the conversation.", err=True)
    while True:
        try:
            text = input("> ")
        except EOFError:
            click.echo()
            return
        if not text.strip():
            continue
        if not chat:
            _say(loaded, text, sampling, show=True)
            continue
        messages.append({"role": "user", "content": text})
        messages.append({"role": "assistant", "content": _say(loaded, messages, sampling, show=True)})
