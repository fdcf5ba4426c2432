"""Options that several verbs share."""

from __future__ import annotations

import functools
import os
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click

from merge.checkpoint.trust import FLAG, trusting
from merge.cli import Invocation
from merge.show.terminal import printable

Function = TypeVar("Function", bound=Callable[..., Any])
_UNITS = {"": 1, "B": 1}
for _power, _letter in enumerate("KMGT", 1):
    _UNITS |= {_letter: 1000**_power, f"{_letter}B": 1000**_power, f"{_letter}IB": 1024**_power}


class Size(click.ParamType):  # type: ignore[type-arg]  # not generic in click 8.1
    """A number of bytes: 5GB is 5 * 10^9, 4GiB is 4 * 2^30."""

    name = "size"

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> int:
        if isinstance(value, int):
            return value
        match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", str(value))
        unit = _UNITS.get(match[2].upper()) if match else None
        if match is None or unit is None or not 1 <= float(match[1]) * unit < 1 << 63:
            self.fail(f'"{value}" is not a size; write for example 5GB or 512MiB', param, ctx)
        return int(float(match[1]) * unit)


class _NamedPath(click.Path):
    def convert(
        self, value: str | os.PathLike[str], param: click.Parameter | None, ctx: click.Context | None
    ) -> str | bytes | os.PathLike[str]:
        if not os.fspath(value):
            self.fail("the path is empty; name a file or directory (. is the working directory)", param, ctx)
        return super().convert(value, param, ctx)


PATH = _NamedPath(path_type=Path)


def json_flag(help: str) -> Callable[[Function], Function]:
    """--json: results as JSON on stdout. If the command fails, main() prints its problems as JSON too."""

    def note(ctx: click.Context, param: click.Parameter, value: bool) -> bool:
        if isinstance(ctx.obj, Invocation):
            ctx.obj.as_json = value
        return value

    return click.option("--json", "as_json", is_flag=True, is_eager=True, callback=note, help=help)


quiet_option = click.option("--quiet", is_flag=True, help="No progress bar and no notes.")
threads_option = click.option(
    "--threads", type=click.IntRange(1, 1024), help="Worker threads.  [default: all processors]"
)
json_option = json_flag("Print the summary as JSON.")
shard_size_option = click.option(
    "--shard-size", type=Size(), default="5GB", show_default=True, help="Largest output file."
)
out_option = click.option("-o", "--out", required=True, type=PATH, help="Directory for the result.")
method_file_option = click.option(
    "--method-file",
    "method_files",
    multiple=True,
    type=PATH,
    help="A Python file with merge methods; may be repeated.",
)
html_option = click.option("--html", type=PATH, help="Write a page with tables and plots.")
max_ram_option = click.option("--max-ram", type=Size(), help="Limit on memory, e.g. 1GiB.")
stages_dir_option = click.option(
    "--stages-dir",
    type=PATH,
    help="Directory for the stages of a pipeline that others need.  [default: OUT.stages]",
)
keep_stages_option = click.option("--keep-stages", is_flag=True, help="Write and keep every stage of a pipeline.")
compat_option = click.option(
    "--compat",
    type=click.Choice(["mergekit"]),
    help="Ignore keys that mergekit ignores, with a note; the same as compat: in the recipe.",
)
force_option = click.option(
    "--force", is_flag=True, help="Replace an existing result; discard unfinished work of another run."
)
refuse_above_option = click.option(
    "--max-ram", type=Size(), help="Fail if the model cannot be streamed and would need more memory than this."
)
no_bar_option = click.option("--quiet", is_flag=True, help="No progress bar.")


def trust_option(function: Function) -> Function:
    """Adds --trust-remote-code to a verb that loads models, and runs the command with these models trusted."""

    @functools.wraps(function)
    def command(*arguments: object, trust_remote_code: tuple[str, ...], **keywords: object) -> object:
        def say(text: str) -> None:
            if not keywords.get("quiet"):
                click.echo(f"note: {printable(text)}", err=True)

        with trusting(*trust_remote_code, say=say):
            return function(*arguments, **keywords)

    option = click.option(
        FLAG,
        multiple=True,
        metavar="MODEL",
        help="Allow this model's own Python code to run; may be repeated.",
    )
    return option(command)  # type: ignore[return-value]


def check_device(device: str) -> None:
    """Raises UsageError for a device that this machine does not have."""
    from merge.errors import UsageError

    if device == "cpu":
        return
    match = re.fullmatch(r"cuda(:\d{1,4})?", device)
    if match is None:
        raise UsageError(f'--device "{device}": expected cpu, cuda or cuda:N.')
    import torch

    if not torch.cuda.is_available():
        raise UsageError(
            "--device cuda: torch finds no GPU here (a CPU build of torch, or no driver). Use --device cpu."
        )
    count = torch.cuda.device_count()
    if match[1] and int(match[1][1:]) >= count:
        raise UsageError(f"--device {device}: torch finds {count} here, numbered from cuda:0.")


def elapsed() -> float | None:
    """Seconds since the command began, with its imports and plans; None outside of `merge`."""
    context = click.get_current_context(silent=True)
    return time.monotonic() - context.obj.began if context and isinstance(context.obj, Invocation) else None
