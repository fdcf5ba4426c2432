"""The `merge` command: one file a verb, imported when it is called, so that `merge --help` is quick."""

from __future__ import annotations

import atexit
import contextlib
import gc
import importlib
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

import click

# The order of `merge --help`; a verb that is not named comes after these.
_ORDER = (
    *(
        "run",
        "plan",
        "verify",
        "methods",
        "diff",
        "analyse",
        "convert",
        "quantize",
        "lora",
        "tokenizers",
        "transplant",
        "statistics",
    ),
    *(
        "finetune",
        "generate",
        "classify",
        "memory",
        "formats",
        "eval",
        "compare",
        "soup",
        "search",
        "sweep",
        "perplexity",
    ),
)


def _verbs() -> dict[str, str]:
    """verb -> what it does, from the first line of its file: `merge VERB: What it does.`"""
    found = {}
    for file in Path(__file__).parent.glob("*.py"):
        with file.open(encoding="utf-8") as lines:
            verb, _, text = lines.readline().strip().strip('"').partition(": ")
        if verb == f"merge {file.stem}":
            found[file.stem] = text
    return {verb: found[verb] for verb in (*_ORDER, *sorted(found.keys() - set(_ORDER)))}


VERBS = _verbs()


@dataclass
class Invocation:
    """What main() knows about the command that runs: whether it was called with --json, and when it began."""

    as_json: bool = False
    began: float = field(default_factory=time.monotonic)


class _Verbs(click.Group):
    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(VERBS)

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:
        if name not in VERBS:
            return None
        command: click.Command = importlib.import_module(f"merge.cli.{name}").command
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl(list(VERBS.items()))

    def resolve_command(self, ctx: click.Context, args: list[str]) -> Any:
        from merge.schema.names import nearest

        if args and args[0] not in VERBS and (near := nearest(args[0], VERBS)):
            ctx.fail(f'no such command "{args[0]}"; did you mean "{near}"?')
        return super().resolve_command(ctx, args)


@click.group(
    cls=_Verbs,
    epilog="""\b
Examples:
  merge run recipes/quickstart.yaml
  merge plan recipe.yaml --tensors
  merge verify merged/quickstart
  merge methods ties""",
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
)
@click.version_option(None, "--version", package_name="merge-workbench", prog_name="merge")
def cli() -> None:
    """Merge language models on a laptop: streamed, exact, resumable, verified."""


def main() -> None:
    """Runs the command line; every error becomes one message and its exit code, and with --json an object on stdout."""
    from merge.errors import MergeError, is_kept

    for name in ("stdout", "stderr"):  # None where the shell closed it (2>&-)
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115

    atexit.register(gc.freeze)  # Python looks for cycles as it ends, which takes a quarter of a small run's time
    invocation = Invocation()
    try:
        with _terminable():
            code = cli(prog_name="merge", standalone_mode=False, obj=invocation)
        sys.exit(code if isinstance(code, int) else 0)
    except MergeError as error:
        _problems(invocation, error)
        _end(_shortened(error), error.exit_code)
    except click.ClickException as error:
        _problems(invocation, error)
        error.show()
        sys.exit(2)
    except (KeyboardInterrupt, click.Abort) as error:
        _end(_interrupted(error), 130)
    except _Terminated as error:
        _end(_interrupted(error), 143)
    except BrokenPipeError:
        sys.stderr.close()
        sys.exit(0)
    except (MemoryError, RuntimeError, ImportError) as error:
        if not isinstance(error, MemoryError) and not any(words in str(error).lower() for words in _NO_MEMORY):
            raise
        kept = " Finished work is kept." if is_kept(error) else ""
        message = f"out of memory. Use fewer --threads, give --max-ram, or free some memory.{kept}"
        _problems(invocation, message)
        _end(message, 1)
    except OSError as error:  # errors of the machine; those with a better message are caught where they happen
        place = f"{error.filename}: " if error.filename else ""
        message = f"{place}{error.strerror or error}."
        _problems(invocation, message)
        _end(message, 1)


# The wording of Python and the library loader.
_NO_MEMORY = ("can't start new thread", "can't allocate lock", "cannot allocate memory", "failed to map segment")
_MOST_PROBLEMS = 12


def _interrupted(error: BaseException) -> str:
    from merge.errors import is_kept

    # click wraps Ctrl-C in its own error
    kept = is_kept(error) or (error.__cause__ is not None and is_kept(error.__cause__))
    return "Interrupted. Finished work is kept; run the same command to resume." if kept else "Interrupted."


def _problems(invocation: Invocation, error: Exception | str) -> None:
    """With --json: all problems on stdout, as one object."""
    from merge.errors import Problem, RecipeError

    if not invocation.as_json:
        return
    text = error.format_message() if isinstance(error, click.ClickException) else str(error)
    found = error.problems if isinstance(error, RecipeError) else [Problem(text)]
    advice = error.advice if isinstance(error, RecipeError) else ()
    problems = [{"where": p.where, "message": p.message, "hint": p.hint} for p in found]
    with contextlib.suppress(BrokenPipeError):
        click.echo(json.dumps({"problems": problems, "advice": list(advice)}))


def _end(message: str, code: int) -> NoReturn:
    from merge.show.terminal import printable

    click.echo("\n".join(map(printable, f"merge: {message}".split("\n"))), err=True)
    sys.exit(code)


def _shortened(error: Exception) -> str:
    """The message; with very many problems, the first ones."""
    from merge.errors import RecipeError, folded

    if not isinstance(error, RecipeError):
        return str(error)
    lines = folded(error.problems)
    if len(lines) <= _MOST_PROBLEMS:
        return str(error)
    of_recipe = sys.argv[1:2] in (["run"], ["plan"], ["eval"], ["generate"], ["perplexity"])
    how = "merge plan RECIPE --json lists them all" if of_recipe else f"the first {_MOST_PROBLEMS} are shown"
    return "\n".join([*lines[:_MOST_PROBLEMS], f"{len(error.problems):,} problems; {how}.", *error.advice])


class _Terminated(BaseException):
    """SIGTERM, handled like Ctrl-C, so that threads, files and the lock are closed properly."""


@contextlib.contextmanager
def _terminable() -> Iterator[None]:
    def terminate(signal_number: int, frame: object) -> None:
        raise _Terminated

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, terminate)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
