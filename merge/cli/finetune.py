"""merge finetune: Train a model or an adapter on your data."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from finetune.before import check_packages
from finetune.distributed import is_first
from finetune.keys import KEYS, Config, ConfigKey
from merge.cli.options import json_option, trust_option
from merge.needs import need
from merge.quoting import counted
from merge.show.terminal import memory, printable

if TYPE_CHECKING:
    from finetune.prepare import Prepared
    from finetune.train import TrainingReport

_REPEATED = ("words", "data", "fraction|data")


class _Grouped(click.Command):
    """Shows the flags of the config by group."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        try:
            return super().parse_args(ctx, args)
        except click.NoSuchOption as error:
            from finetune.foreign import ours

            said = ours(error.option_name.lstrip("-").replace("-", "_"), flag=True)
            if said is None:
                raise
            raise click.NoSuchOption(
                error.option_name, f"No such option {error.option_name}; {said}.", ctx=ctx
            ) from None

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        groups: dict[str, list[tuple[str, str]]] = {"Options": []}
        for option in self.get_params(ctx):
            record = option.get_help_record(ctx)
            if record is not None:
                groups.setdefault(KEYS[option.name].group if option.name in KEYS else "Options", []).append(record)
        for group in (*(name for name in groups if name != "Options"), "Options"):
            with formatter.section(group):
                formatter.write_dl(groups[group])


def _option(name: str, key: ConfigKey) -> Callable[[Any], Any]:
    flag = name.replace("_", "-")
    names = [f"--{flag}", *(["-o"] if name == "out" else [])]
    default = next(field.default for field in dataclasses.fields(Config) if field.name == name)
    plain = isinstance(default, (bool, int, float, str)) and default is not False and default != ""
    shown = f"  [default: {_as_written(default)}]" if plain else ""
    only = f"  ({', '.join(key.only or key.objectives)})" if key.only or key.objectives else ""
    choices = f"  One of {', '.join(key.choices)}." if len(key.choices) > _INLINE else ""
    help_text = key.help + choices + only + shown
    if key.kind == "bool":
        return click.option(f"--{flag}/--no-{flag}", name, default=None, help=help_text)
    metavar = "|".join(key.choices) if 0 < len(key.choices) <= _INLINE else _METAVARS.get(key.kind, "TEXT")
    return click.option(*names, name, multiple=key.kind in _REPEATED, metavar=metavar, help=help_text)


def _as_written(default: object) -> str:
    return f"{default:g}" if isinstance(default, float) else str(default).lower()


_INLINE = 4  # so many choices stand in place of the value
_METAVARS = {"int": "N", "float": "X", "data": "FILE", "fraction|data": "X|FILE", "words": "A,B", "table": "{A: N}"}


def _with_keys(command: Callable[..., None]) -> Callable[..., None]:
    for name in reversed([name for name in KEYS if name != "adapter"]):
        command = _option(name, KEYS[name])(command)
    return command


@click.command(
    "finetune",
    cls=_Grouped,
    epilog="""\b
Examples:
  merge finetune recipes/finetune/sort.yaml
  merge finetune config.yaml --rank 32 --epochs 3 -o tuned/rank-32
  merge finetune org/base --data train.jsonl --validation 0.05 -o tuned/mine
  merge finetune config.yaml --show 3            what is trained on, with the loss mask; nothing is trained
  merge finetune continue tuned/mine --data more.jsonl -o tuned/more
  merge finetune tasks.yaml --strategy sequential,parallel --workers 2
  accelerate launch -m merge finetune config.yaml
Interrupted or killed, the same command resumes where it stopped.""",
)
@click.argument("words", nargs=-1, metavar="[CONFIG.yaml | MODEL | continue ADAPTER [CONFIG.yaml]]")
@_with_keys
@click.option("--show", type=click.IntRange(1), metavar="N", help="Print N examples with their loss mask, and stop.")
@click.option("--strategy", metavar="A,B", help="For a config with tasks: simultaneous, sequential, parallel.")
@click.option("--workers", type=click.IntRange(1, 64), help="Processes of the parallel strategy.")
@click.option(
    "--device", type=click.Choice(["cpu", "cuda"]), help="Device to train on.  [default: a GPU if there is one]"
)
@click.option(
    "--threads", type=click.IntRange(1, 1024), help="Threads of torch.  [default: OMP_NUM_THREADS, or all processors]"
)
@click.option("--force", is_flag=True, help="Replace an existing result; discard other unfinished work.")
@click.option("--quiet", is_flag=True, help="No progress and no notes.")
@json_option
@trust_option
def command(
    words: tuple[str, ...],
    show: int | None,
    strategy: str | None,
    workers: int | None,
    device: str | None,
    threads: int | None,
    force: bool,
    quiet: bool,
    as_json: bool,
    **flags: object,
) -> None:
    """Train a model, or an adapter for one, on your data.

    Every key of CONFIG.yaml is also a flag, which overrides the file.
    """
    need("merge finetune", "finetune", "accelerate", "peft")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # it would warn when data loaders fork
    first = is_first()
    quiet = quiet or not first

    def say(text: str) -> None:
        if not quiet:
            click.echo(printable(text), err=True)

    if _has_tasks(words, strategy, workers, show):
        from merge.cli.finetune_tasks import run_tasks

        machine: dict[str, Any] = {"device": device, "threads": threads, "force": force}
        own: dict[str, Any] = {"strategy": strategy, "workers": workers, "quiet": quiet, "as_json": as_json}
        run_tasks(words[0], _given(flags), **own, **machine, say=say, bar=_progress)
        return
    file, config = _read(words, flags, show is not None)
    check_packages(config)
    from finetune.prepare import prepare
    from finetune.train import finetune

    prepared = prepare(config, Path(file).parent if file is not None else None)
    for note in prepared.notes:
        say(f"note: {note}")
    if show is not None:
        _show(prepared, show)
        return
    for part, lengths in prepared.data.lengths.items():
        say(f"{part}: {lengths}")
    with _progress(Path(config.out).name, quiet) as progress:
        report = finetune(prepared, device=device, threads=threads, force=force, say=say, progress=progress)
    for note in report.notes[len(prepared.notes) :]:
        say(f"note: {note}")
    if first:
        _print(report, as_json)


def _has_tasks(words: tuple[str, ...], strategy: str | None, workers: int | None, show: int | None) -> bool:
    """Whether this is a config with tasks. Raises UsageError for flags of the other kind of config."""
    from finetune.before import is_task_file
    from merge.errors import UsageError

    found = len(words) == 1 and is_task_file(words[0])
    if found and show is not None:
        raise UsageError("--show: the config has several tasks. Write a config with one of them to see its data.")
    if not found and (strategy is not None or workers is not None):
        flag = "--workers" if strategy is None else "--strategy"
        raise UsageError(f"{flag}: only for a config with tasks; see docs/finetune.md.")
    return found


def _given(flags: dict[str, Any]) -> dict[str, list[str]]:
    """The given flags, as strings."""
    return {
        name: [str(value).lower() if isinstance(value, bool) else value]
        if not isinstance(value, tuple)
        else list(value)
        for name, value in flags.items()
        if value is not None and value != ()
    }


def _read(words: tuple[str, ...], flags: dict[str, object], only_shown: bool) -> tuple[str | None, Config]:
    """The words after `finetune`, and the flags -> (config file, config)."""
    from finetune.config import load_config
    from merge.errors import UsageError

    defaults: dict[str, Any] = {"out": "shown"} if only_shown else {}
    if words[:1] == ("continue",):
        from finetune.adapters import adapter_defaults

        if len(words) < 2:
            raise UsageError("merge finetune continue: name the adapter's directory.")
        defaults |= adapter_defaults(Path(words[1]))
        words = words[2:]
    if len(words) > 1:
        raise UsageError(f'merge finetune: one config file, not "{" ".join(words)}"; use flags to override its keys.')
    given = _given(flags)
    if words and not _is_config(words[0]):
        if "model" in given:
            raise UsageError(f"merge finetune {words[0]}: the model is named twice, here and by --model.")
        given["model"], words = [words[0]], ()
    file = words[0] if words else None
    return file, load_config(file, given, defaults)


def _is_config(word: str) -> bool:
    """Whether it is a config file, and not a model's directory or hub id."""
    path = Path(word)
    return path.suffix.lower() in (".yaml", ".yml", ".json") or path.is_file() or not (path.is_dir() or "/" in word)


def _show(prepared: Prepared, count: int) -> None:
    from rich.console import Console

    from finetune.data.show import show_examples

    for part, lengths in prepared.data.lengths.items():
        click.echo(f"{part}: {lengths}")
    console = Console(highlight=False, markup=False, emoji=False, soft_wrap=True)
    show_examples(list(prepared.data.train.examples[:count]), prepared.base.tokenizer, console)


def _print(report: TrainingReport, as_json: bool) -> None:
    if as_json:
        click.echo(json.dumps(dataclasses.asdict(report)))
        return
    losses = report.losses
    before, after = losses["validation_before"], losses["validation"]
    held_out = (
        f"; validation loss {before:.4f} before, {after:.4f} after" if before is not None and after is not None else ""
    )
    click.echo(f"{printable(report.out)}: {counted(report.steps, 'step')}{held_out}")
    for name, (first, last) in report.metrics.items():
        click.echo(f"{name.replace('_', ' ')}: {first:.4f} before, {last:.4f} after")
    rate = report.tokens / max(report.seconds, 1e-9)
    click.echo(f"{report.seconds:.1f} s, {rate:,.0f} tokens/s, peak memory {memory(report.peak_memory)}")


@contextlib.contextmanager
def _progress(label: str, quiet: bool) -> Iterator[Callable[[int, int, dict[str, float]], None]]:
    """A bar with the loss on a terminal; elsewhere a line for each logged loss."""
    if quiet:
        yield lambda step, steps, logs: None
        return
    if not sys.stderr.isatty():
        yield _Lines()
        return
    from rich.console import Console
    from rich.markup import escape
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[losses]}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    known: dict[str, float] = {}
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task(escape(label), total=None, losses="")

        def update(step: int, steps: int, logs: dict[str, float]) -> None:
            known.update({key: value for key, value in logs.items() if key in ("loss", "eval_loss")})
            text = "  ".join(f"{_SHOWN[key]} {value:.4f}" for key, value in known.items())
            bar.update(task, completed=step, total=steps, losses=text)

        yield update


_SHOWN = {"loss": "loss", "eval_loss": "validation"}


class _Lines:
    """A line for each logged loss, with the time left, estimated from the first step on."""

    def __init__(self) -> None:
        self._first: tuple[int, float] | None = None

    def __call__(self, step: int, steps: int, logs: dict[str, float]) -> None:
        now = time.monotonic()
        if step and self._first is None:
            self._first = (step, now)
        parts = [f"{_SHOWN[key]} {logs[key]:.4f}" for key in _SHOWN if key in logs]
        if not parts:
            return
        if self._first and step > self._first[0] and step < steps:
            left = (now - self._first[1]) / (step - self._first[0]) * (steps - step)
            parts.append(f"about {_duration(left)} left")
        click.echo(f"step {step}/{steps}: {', '.join(parts)}", err=True)


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
