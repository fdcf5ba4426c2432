"""merge perplexity: Measure perplexity on a text, or the KL divergence between two models."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from merge.cli.options import PATH, Size, json_flag, quiet_option, refuse_above_option, trust_option
from merge.quoting import counted
from merge.show.terminal import printable, progress_bar, show_notes

if TYPE_CHECKING:
    from merge.tools.perplexity import Distance, Perplexity, TokenMean

_SHOWN = 1000  # steps of the bar


@click.command(
    "perplexity",
    epilog="""\b
Examples:
  merge perplexity org/model-7b --data text.txt
  merge perplexity merged --data held-out.jsonl --against base
  merge perplexity recipe.yaml --data text.txt --context 2048 --stride 1024 --json""",
)
@click.argument("model")
@click.option("--data", required=True, type=PATH, help='A text, or .jsonl with "text" in each line.')
@click.option(
    "--against", help="Another model: measure the KL divergence from it, and how often both prefer the same token."
)
@click.option("--context", type=click.IntRange(2), help="Tokens in a window.  [default: 1024, or what the model takes]")
@click.option("--stride", type=click.IntRange(1), help="Tokens between starts of windows.  [default: the context]")
@click.option(
    "--hidden-ram",
    type=Size(),
    default="256MiB",
    show_default=True,
    help="Memory for hidden states; more goes to disk.",
)
@refuse_above_option
@click.option("--threads", type=click.IntRange(1), help="[default: all cores]")
@quiet_option
@json_flag("Print the result as JSON.")
@trust_option
def command(
    model: str,
    data: Path,
    against: str | None,
    context: int | None,
    stride: int | None,
    hidden_ram: int,
    max_ram: int | None,
    threads: int | None,
    quiet: bool,
    as_json: bool,
) -> None:
    """Perplexity of MODEL on a text: a directory, hub id, model+adapter, or recipe (merged on the fly).

    The model is read one decoder layer at a time and need not fit into memory; if its architecture does not allow
    that, a note says so first. Arithmetic is float32, on CPU.
    """
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    from eval.models import directory, subjects
    from merge.loading import code_that_ran
    from merge.tools.perplexity import measure

    notes: list[str] = []

    def say(note: str) -> None:
        show_notes([note], quiet)
        notes.append(note)

    began = time.monotonic()
    judged = subjects([model] if against is None else [model, against])
    with contextlib.ExitStack() as stack:
        paths = [stack.enter_context(directory(each)) for each in judged]
        if threads is not None:
            import torch

            torch.set_num_threads(threads)
        progress = stack.enter_context(progress_bar(judged[0].name, _SHOWN, quiet or not sys.stderr.isatty()))
        own, other, distance = measure(
            paths[0],
            data,
            against=paths[1] if against is not None else None,
            context=context,
            stride=stride,
            budget=hidden_ram,
            max_ram=max_ram,
            say=say,
            progress=lambda share: progress(round(share * _SHOWN)),
        )
    if as_json:
        found: dict[str, Any] = {"model": _as_json(model, own), "seconds": round(time.monotonic() - began, 3)}
        found |= {"notes": notes, "trusted_code": code_that_ran()}
        if against is not None and other is not None and distance is not None:
            found |= {"against": _as_json(against, other), **dataclasses.asdict(distance)}
        click.echo(json.dumps(found))
        return
    windows = f"{counted(own.windows, 'window')} of {counted(own.documents, 'document')}"
    click.echo(f"{counted(own.tokens, 'token')} scored in {windows}")
    click.echo(f"{printable(judged[0].name)}: {_line(own)}")
    if other is not None and distance is not None:
        click.echo(f"{printable(judged[1].name)}: {_line(other)}")
        click.echo(_distance(judged[0].name, judged[1].name, distance))


def _as_json(text: str, found: Perplexity) -> dict[str, object]:
    data = dataclasses.asdict(found)
    return {"name": text, "perplexity": dataclasses.asdict(found.perplexity), **data}


def _line(found: Perplexity) -> str:
    return f"perplexity {_number(found.perplexity)}, {_number(found.nll)} nats a token"


def _distance(name: str, other: str, found: Distance) -> str:
    percent = f"{100 * found.top1.value:.2f} %"
    if found.top1.error is not None:
        percent += f" ± {100 * found.top1.error:.2f}"
    return f"KL({printable(other)} || {printable(name)}) {_number(found.kl)} nats a token; same best token {percent}"


def _number(found: TokenMean) -> str:
    return f"{found.value:.5g}" + (f" ± {found.error:.2g}" if found.error is not None else "")
