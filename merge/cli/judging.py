"""What the verbs that judge models share: their options, the evaluation itself, its progress bar, files."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from merge.cli.options import PATH, check_device
from merge.jsontext import parse_json
from merge.needs import need

if TYPE_CHECKING:
    from eval.models import Subject
    from eval.results import Results
    from eval.settings import Settings
    from eval.tasks.task import Task

Function = TypeVar("Function", bound=Callable[..., Any])
_FILE = PATH
QUICK = 30  # items of each task
_OPTIONS = (
    click.option("--suite", help="A suite of tasks: quickstart, core, openllm-v1, openllm-v2."),
    click.option("--tasks", help="lm-eval's names, or .jsonl and .yaml files, separated by commas."),
    click.option("--include", type=_FILE, help="A directory with tasks of your own."),
    click.option("--data", type=_FILE, help="A text, .txt or .jsonl: bits per byte on it."),
    click.option(
        "--limit", type=click.IntRange(1), help="Items of each task, sampled once and the same for all models."
    ),
    click.option("--quick", is_flag=True, help=f"A first look: --limit {QUICK}."),
    click.option("--seed", default=0, show_default=True, help="Seed of the sampled items."),
    click.option("--num-fewshot", type=click.IntRange(0), help="Examples in each prompt.  [default: the task's]"),
    click.option("--chat-template", is_flag=True, help="Wrap prompts in the model's chat template."),
    click.option("--system", help="System instruction."),
    click.option("--device", default="cpu", show_default=True, help="cpu, or cuda."),
    click.option("--dtype", help="float32, bfloat16 ...  [default: float32 on a CPU, else as stored]"),
    click.option("--batch-size", type=click.IntRange(0), default=0, help="Batch size.  [default: found by trying]"),
    click.option("--backend", default="hf", show_default=True, help="lm-eval's model type: hf, vllm, gguf ..."),
    click.option(
        "--model-args", default="", help="Further arguments of the backend, as lm-eval takes them: key=value,key=value."
    ),
    click.option("--keep", type=_FILE, help="Keep models merged on the fly in this directory."),
    click.option("--cache", type=_FILE, help="File for remembered answers.  [default: in ~/.cache]"),
    click.option("--unsafe-code", is_flag=True, help="Allow tasks that run code written by models."),
    click.option("--quiet", is_flag=True, help="No progress bar."),
)


def judging_options(function: Function) -> Function:
    """Adds the options; the command takes them as keywords and gives them to judging()."""
    for option in reversed(_OPTIONS):
        function = option(function)
    return function


@dataclass(frozen=True)
class Judging:
    """Tasks and settings of an evaluation. `judge` takes models as text, `of` located models and other settings."""

    tasks: tuple[Task, ...]
    settings: Settings
    cache: Path | None
    keep: Path | None
    quiet: bool

    def judge(self, models: Sequence[str], ensembles: Sequence[Sequence[str]] = ()) -> Results:
        from eval.models import subjects

        members = [subjects(list(names)) for names in ensembles]
        return self.of(subjects(list(models)), self.settings, members)

    def of(
        self, subjects: Sequence[Subject], settings: Settings, ensembles: Sequence[Sequence[Subject]] = ()
    ) -> Results:
        from eval.harness import evaluate
        from eval.memory import Memory, default_path

        with Memory(self.cache or default_path()) as memory, _progress(self.quiet) as progress:
            return evaluate(
                subjects, self.tasks, settings, memory, ensembles=ensembles, keep=self.keep, progress=progress
            )


def judging(asked: dict[str, Any]) -> Judging:
    """Makes a Judging of the options; raises UsageError if they are wrong."""
    from merge.errors import UsageError

    _check_installed(asked["backend"])
    check_device(asked["device"])
    if asked["quick"] and asked["limit"] is not None:
        raise UsageError(
            f"--quick and --limit: both set the number of items; --quick is --limit {QUICK}. Leave one out."
        )
    _check_dtype(asked["dtype"])
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    from eval.settings import Settings
    from eval.tasks import resolve

    names = [name.strip() for name in (asked["tasks"] or "").split(",") if name.strip()]
    tasks = resolve(names, asked["suite"], asked["include"], asked["data"])
    settings = Settings(
        backend=asked["backend"],
        model_args=_arguments(asked["model_args"]),
        device=asked["device"],
        dtype=asked["dtype"],
        batch_size=asked["batch_size"],
        num_fewshot=asked["num_fewshot"],
        limit=QUICK if asked["quick"] else asked["limit"],
        seed=asked["seed"],
        chat_template=asked["chat_template"],
        system_instruction=asked["system"],
        include=asked["include"],
        unsafe_code=asked["unsafe_code"],
    )
    return Judging(tasks, settings, asked["cache"], asked["keep"], asked["quiet"])


def _check_installed(backend: str) -> None:
    need("judging models", "eval", "lm_eval", "accelerate")
    if backend.startswith("vllm"):
        need(f"--backend {backend}", "lm-eval[vllm]", "vllm")
    if backend.startswith(("local-", "openai-")):
        need(f"--backend {backend}", "lm-eval[api]", "requests", "aiohttp", "tenacity")


def _check_dtype(name: str | None) -> None:
    import torch

    from merge.errors import UsageError

    if name not in (None, "auto") and not isinstance(getattr(torch, str(name), None), torch.dtype):
        raise UsageError(f'--dtype {name}: expected float32, bfloat16, float16 or "auto" (as stored).')


def check_files(**files: Path | None) -> None:
    """Raises UsageError for an output file that cannot be written, before the work. Keys are options."""
    from merge.errors import UsageError

    for option, path in files.items():
        if path is not None and path.is_dir():
            raise UsageError(f"--{option} {path}: is a directory; expected the name of a file.")


def write_text(path: Path, text: str) -> None:
    """Writes a file completely or not at all; writes directly to special files such as /dev/stdout.

    Raises:
        OutputError: it cannot be written.
    """
    from merge.errors import OutputError
    from merge.output.directory import write_whole

    try:
        if path.exists() and not path.is_file():
            path.write_text(text, encoding="utf-8")
        else:
            write_whole(path, text.encode())
    except OSError as error:
        raise OutputError(f"{path}: cannot be written ({error.strerror}).") from error


def _arguments(text: str) -> dict[str, object]:
    """`a=1,b=x` -> a dictionary, with numbers and booleans parsed."""
    from merge.errors import UsageError

    found: dict[str, object] = {}
    for part in filter(None, text.split(",")):
        key, equals, value = part.partition("=")
        if not equals or not key.strip():
            raise UsageError(f'--model-args "{part}": expected key=value.')
        try:
            found[key.strip()] = parse_json(value)
        except ValueError:
            found[key.strip()] = {"True": True, "False": False}.get(value, value)
    return found


@contextmanager
def _progress(quiet: bool) -> Iterator[Callable[[str, str, int, int], None]]:
    """Progress on stderr: a bar for each model and task, or a line for each if stderr is not a terminal."""
    if quiet:
        yield lambda model, task, done, total: None
        return
    if not sys.stderr.isatty():
        said: set[tuple[str, str]] = set()

        def line(model: str, task: str, done: int, total: int) -> None:
            if (model, task) not in said:
                said.add((model, task))
                click.echo(f"{model}: {task}", err=True)

        yield line
        return
    from rich.console import Console
    from rich.markup import escape
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True)) as bars:
        shown: dict[tuple[str, str], object] = {}

        def update(model: str, task: str, done: int, total: int) -> None:
            key = (model, task)
            if key not in shown:
                shown[key] = bars.add_task(escape(f"{model}: {task}"), total=total or None)
            bars.update(shown[key], completed=done, total=max(done, total) or None)  # type: ignore[arg-type]

        yield update
