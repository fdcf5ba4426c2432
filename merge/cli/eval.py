"""merge eval"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import click

from merge.cli.run import check_device


@click.command(
    "eval",
    epilog="""\b
Examples:
  merge eval base expert merged --suite quickstart
  merge eval recipe.yaml --tasks arc_easy,hellaswag --limit 200
  merge eval org/model+org/adapter --tasks questions.jsonl -o results.json
Answers are remembered by the digest of the weights: the same command goes on after a kill, and another model costs
only that model. Compare saved results with merge compare.""",
)
@click.argument("models", metavar="MODEL...", nargs=-1, required=True)
@click.option("--suite", help="Tasks that belong together: quickstart, core, openllm-v1, openllm-v2.")
@click.option("--tasks", help="Names of lm-eval, or .jsonl and .yaml files; commas between them.")
@click.option("--include", type=click.Path(path_type=Path), help="A directory with tasks of your own.")
@click.option("-o", "--out", type=click.Path(path_type=Path), help="File for the results.  [default: none]")
@click.option("--limit", type=click.IntRange(1), help="Items of each task, drawn once and the same for all models.")
@click.option("--seed", default=0, show_default=True, help="Draws the items of --limit.")
@click.option("--num-fewshot", type=click.IntRange(0), help="Examples in each prompt.  [default: the task's]")
@click.option("--chat-template", is_flag=True, help="Wrap prompts in the model's chat template.")
@click.option("--system", help="System instruction.")
@click.option("--device", default="cpu", show_default=True, help="cpu, or cuda.")
@click.option("--dtype", help="float32, bfloat16 ...  [default: float32 on a CPU, else as stored]")
@click.option("--batch-size", type=click.IntRange(0), default=0, help="Sequences at once.  [default: found]")
@click.option(
    "--backend", default="hf", show_default=True, help="lm-eval's model type: hf, vllm, local-completions ..."
)
@click.option("--model-args", default="", help="More for the backend, as lm-eval takes it: key=value,key=value.")
@click.option("--keep", type=click.Path(path_type=Path), help="Keep models merged on the fly in this directory.")
@click.option("--cache", type=click.Path(path_type=Path), help="File of remembered answers.  [default: in ~/.cache]")
@click.option("--unsafe-code", is_flag=True, help="Allow tasks that run code which models write.")
@click.option("--quiet", is_flag=True, help="No progress bar.")
@click.option("--json", "as_json", is_flag=True, help="Print the results as JSON.")
def command(
    models: tuple[str, ...],
    suite: str | None,
    tasks: str | None,
    include: Path | None,
    out: Path | None,
    limit: int | None,
    seed: int,
    num_fewshot: int | None,
    chat_template: bool,
    system: str | None,
    device: str,
    dtype: str | None,
    batch_size: int,
    backend: str,
    model_args: str,
    keep: Path | None,
    cache: Path | None,
    unsafe_code: bool,
    quiet: bool,
    as_json: bool,
) -> None:
    """Judge MODELs on the same items: directories, hub ids, model+adapter, or recipes (merged on the fly)."""
    check_device(device)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    from eval.harness import Settings, evaluate
    from eval.memory import Memory, default_path
    from eval.models import subjects
    from eval.tasks import resolve

    names = [name.strip() for name in (tasks or "").split(",") if name.strip()]
    asked = resolve(names, suite, include)
    settings = Settings(
        backend=backend,
        model_args=_arguments(model_args),
        device=device,
        dtype=dtype,
        batch_size=batch_size,
        num_fewshot=num_fewshot,
        limit=limit,
        seed=seed,
        chat_template=chat_template,
        system_instruction=system,
        include=include,
        unsafe_code=unsafe_code,
    )
    judged = subjects(list(models))
    with Memory(cache or default_path()) as memory, _progress(quiet) as progress:
        results = evaluate(judged, asked, settings, memory, keep=keep, progress=progress)
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        partial = out.with_name(out.name + ".partial")
        partial.write_text(results.to_json(), encoding="utf-8")
        partial.replace(out)
    if as_json:
        click.echo(results.to_json(), nl=False)
        return
    from eval.tables import print_results

    print_results(results)
    if out is not None:
        click.echo(f"results: {out}")


def _arguments(text: str) -> dict[str, object]:
    """`a=1,b=x` -> its values, numbers and booleans as such."""
    from merge.errors import UsageError

    found: dict[str, object] = {}
    for part in filter(None, text.split(",")):
        key, equals, value = part.partition("=")
        if not equals or not key.strip():
            raise UsageError(f'--model-args "{part}": expected key=value.')
        try:
            found[key.strip()] = json.loads(value)
        except ValueError:
            found[key.strip()] = {"True": True, "False": False}.get(value, value)
    return found


@contextmanager
def _progress(quiet: bool) -> Iterator[Callable[[str, str, int, int], None]]:
    """A bar for each model and task on stderr; a line for each where stderr is no terminal."""
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
