"""merge generate: Generate text from a prompt or a file, or chat."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path

import click

from merge.cli.models import opened, read_lines, write
from merge.cli.options import PATH, json_flag, trust_option
from merge.cli.talk import talk
from merge.show.terminal import printable


@click.command(
    "generate",
    epilog="""\b
Examples:
  merge generate merged/mine --prompt "What is a merge?" --chat
  merge generate org/base+org/adapter --file prompts.txt --json
  merge generate recipe.yaml --prompt "1 + 1 ="  merged first, into a temporary directory
  merge generate merged/mine                     a conversation, in a terminal""",
)
@click.argument("model")
@click.option("--prompt", help="Text to continue, or the first message with --chat.")
@click.option("--file", type=PATH, help="A prompt in each line.")
@click.option(
    "--chat/--no-chat", default=None, help="Use the model's chat template.  [default: in a conversation, if it has one]"
)
@click.option("--system", help="System message, with --chat.")
@click.option("--max-tokens", type=click.IntRange(1), help="Maximum of new tokens.  [default: 256, or the model's]")
@click.option(
    "--temperature", type=click.FloatRange(0), default=0.0, show_default=True, help="0: always the most likely token."
)
@click.option("--top-p", type=click.FloatRange(0, 1, min_open=True), default=1.0, show_default=True)
@click.option("--top-k", type=click.IntRange(0), default=0, show_default=True, help="0: all tokens.")
@click.option("--seed", type=click.IntRange(0, 2**63 - 1), default=0, show_default=True, help="Seed of sampling.")
@click.option("--stop", multiple=True, help="Text that ends the output; may be repeated.")
@click.option("--stream/--no-stream", default=True, help="Print text as it is generated.")
@json_flag("Print one line of JSON for each prompt.")
@trust_option
def command(
    model: str,
    prompt: str | None,
    file: Path | None,
    chat: bool | None,
    system: str | None,
    max_tokens: int | None,
    temperature: float,
    top_p: float,
    top_k: int,
    seed: int,
    stop: tuple[str, ...],
    stream: bool,
    as_json: bool,
) -> None:
    """Generate text with MODEL: a directory, hub id, model+adapter, or recipe."""
    from merge.errors import UsageError
    from merge.loading.libraries import quiet_libraries
    from merge.tools.generate import Sampling

    if prompt is not None and file is not None:
        raise UsageError("--prompt and --file: give one of them.")
    prompts = [prompt] if prompt is not None else read_lines(file) if file is not None else None
    if system is not None and (chat is False or (chat is None and prompts is not None)):
        raise UsageError("--system: needs --chat.")
    if not math.isfinite(temperature):
        raise UsageError(f"--temperature: expected a number, found {temperature}.")
    if "" in stop:
        raise UsageError("--stop: expected some text, found none.")
    if prompts is None and not sys.stdin.isatty():
        raise UsageError("merge generate: expected --prompt or --file. Without them it chats, and needs a terminal.")
    if prompts is None and as_json:
        raise UsageError("--json: needs --prompt or --file.")
    sampling = Sampling(max_tokens, temperature, top_p, top_k, seed, stop)
    first = [{"role": "system", "content": system}] if system else []
    with opened(model, say=lambda text: click.echo(printable(text), err=True)) as loaded, quiet_libraries():
        if prompts is None:
            talk(loaded, sampling, first, chat)
            return
        for text in prompts:
            what = [*first, {"role": "user", "content": text}] if chat else text
            answer = "".join(write(loaded, what, sampling, stream and not as_json))
            if as_json:
                click.echo(json.dumps({"prompt": text, "text": answer}, ensure_ascii=False))
            elif not stream:
                click.echo(answer)
