"""merge plan"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from merge.cli.show import Size, memory, size

if TYPE_CHECKING:
    from merge.plan import Plan, Step


@click.command(
    "plan",
    epilog="""\b
Examples:
  merge plan recipe.yaml
  merge plan recipe.yaml --tensors
  merge plan recipe.yaml --json > plan.json""",
)
@click.argument("recipe")
@click.option(
    "-o", "--out", type=click.Path(path_type=Path), help="Where it would be written.  [default: ./merged/NAME]"
)
@click.option("--tensors", is_flag=True, help="One line for each tensor, with its resolved parameters.")
@click.option("--threads", type=click.IntRange(1), help="Worker threads.  [default: all processors]")
@click.option("--max-ram", type=Size(), help="Memory to stay within, e.g. 1GiB.")
@click.option("--device", default="cpu", show_default=True, help="cpu or cuda.")
@click.option("--shard-size", type=Size(), default="5GB", show_default=True, help="Largest output file.")
@click.option("--json", "as_json", is_flag=True, help="Print the whole plan, or its problems, as JSON.")
@click.pass_context
def command(
    ctx: click.Context,
    recipe: str,
    out: Path | None,
    tensors: bool,
    threads: int | None,
    max_ram: int | None,
    device: str,
    shard_size: int,
    as_json: bool,
) -> None:
    """Show what RECIPE would do: made from headers and configs only, in a second or two; nothing is written."""
    from merge.engine.memory import budget
    from merge.engine.space import bytes_free
    from merge.errors import RecipeError
    from merge.planners.build import build_plan
    from merge.recipe import load_recipe

    try:
        plan = build_plan(load_recipe(recipe), shard_bytes=shard_size)
    except RecipeError as error:
        if not as_json:
            raise
        problems = [{"where": p.where, "message": p.message, "hint": p.hint} for p in error.problems]
        click.echo(json.dumps({"problems": problems}, indent=2))
        ctx.exit(error.exit_code)
    needs = budget(plan, threads, max_ram, device)
    totals = {
        "parameters": plan.n_parameters,
        "bytes_read": plan.bytes_read,
        "bytes_written": plan.bytes_written,
        "peak_memory": needs.peak,
        "threads": needs.threads,
        "disk_free": bytes_free(out or Path("merged") / plan.name),
    }
    if as_json:
        click.echo(json.dumps({"problems": [], **totals, "plan": json.loads(plan.to_json())}))
        return
    _show(plan, totals, tensors)


def _show(plan: Plan, totals: dict[str, int], tensors: bool) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console(highlight=False)
    console.print(f"[bold]{plan.name}[/]: {plan.method}, seed {plan.seed}", soft_wrap=True)
    models = Table("model", "role", "files", "size", box=None, pad_edge=False)
    for i, model in enumerate(plan.models):
        role = "base" if i == plan.base_model else "input"
        models.add_row(model.ref, role, str(len(model.files)), size(sum(file.size for file in model.files)))
    console.print(models)
    console.print()
    console.print(_tensor_table(plan) if tensors else _layer_table(plan))
    console.print()
    n_bytes = f"{size(totals['bytes_written'])} in {len(plan.shards)} file{'s' if len(plan.shards) > 1 else ''}"
    console.print(f"result   {len(plan.steps)} tensors, {totals['parameters']:,} parameters, {n_bytes}")
    console.print(f"reads    {size(totals['bytes_read'])} (tensor passes repeat from the page cache)")
    console.print(f"memory   at most {memory(totals['peak_memory'])} with {totals['threads']} threads")
    short = totals["disk_free"] < totals["bytes_written"]
    console.print(f"disk     {size(totals['bytes_written'])} needed, {size(totals['disk_free'])} free", end="")
    console.print("  [bold red]not enough[/]" if short else "")
    for note in plan.notes:
        console.print(f"note     {note}", soft_wrap=True, markup=False)


def _tensor_table(plan: Plan) -> Any:
    from rich.table import Table

    table = Table("tensor", "shape", "dtype", "method", "inputs and parameters", box=None, pad_edge=False)
    for step in plan.steps:
        shape = "x".join(str(n) for n in step.shape) or "scalar"
        table.add_row(step.name, shape, step.dtype, step.method, _sources(plan, step))
    return table


def _sources(plan: Plan, step: Step) -> str:
    """`expert-a weight 0.5 density 0.3 + expert-b ...; t 0.5`"""
    parts = []
    for place, model in enumerate(step.models):
        own = [f"{key} {_number(v[place])}" for key, v in step.parameters.items() if isinstance(v, tuple)]
        name = plan.models[model].ref.rstrip("/").rsplit("/", 1)[-1]
        ref = step.inputs[place]
        if ref.name != step.name:
            name += f":{ref.name}"
        parts.append(" ".join([name, *own]))
    shared = [f"{key} {_number(value)}" for key, value in step.parameters.items() if not isinstance(value, tuple)]
    return " + ".join(parts) + (f"; {' '.join(shared)}" if shared else "")


def _number(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value).lower()


def _layer_table(plan: Plan) -> Any:
    """One row for each run of layers that are treated alike; a range where tensors of a layer differ."""
    from rich.table import Table

    rows: list[tuple[str, list[Step]]] = []
    for label, steps in _by_layer(plan):
        if (
            rows
            and _summary(plan, rows[-1][1]) == _summary(plan, steps)
            and label.isdecimal()
            and rows[-1][0] != "other"
        ):
            first = rows[-1][0].split(" to ")[0]
            rows[-1] = (f"{first} to {label}", rows[-1][1] + steps)
        else:
            rows.append((label, steps))
    table = Table("layers", "tensors", "size", "method", "parameters", box=None, pad_edge=False)
    for label, steps in rows:
        methods, parameters = _summary(plan, steps)
        table.add_row(label, str(len(steps)), size(sum(step.nbytes for step in steps)), methods, parameters)
    return table


def _by_layer(plan: Plan) -> Iterator[tuple[str, list[Step]]]:
    """("other" or the layer's number, its steps), in the order of the output."""
    from merge.architecture import find_stacks, main_stack

    stack = main_stack(find_stacks((step.name for step in plan.steps), {}), {})
    groups: dict[str, list[Step]] = {}
    for step in plan.steps:
        place = stack.layer(step.name) if stack else None
        groups.setdefault("other" if place is None else str(place[0]), []).append(step)
    yield from sorted(groups.items(), key=lambda group: -1 if group[0] == "other" else int(group[0]))


def _summary(plan: Plan, steps: list[Step]) -> tuple[str, str]:
    methods = " ".join(dict.fromkeys(step.method for step in steps))
    values: dict[str, list[float]] = {}
    words: dict[str, str] = {}
    for step in steps:
        for key, value in step.parameters.items():
            if not isinstance(value, tuple):
                _collect(key, value, values, words)
                continue
            for place, one in enumerate(value):
                name = plan.models[step.models[place]].ref.rstrip("/").rsplit("/", 1)[-1]
                _collect(f"{name} {key}", one, values, words)
    numbers = [
        f"{key} {low:.4g}" if low == high else f"{key} {low:.4g}..{high:.4g}"
        for key, found in values.items()
        for low, high in [(min(found), max(found))]
    ]
    if not numbers and not words:
        numbers = [" ".join(dict.fromkeys(plan.models[model].ref for step in steps for model in step.models))]
    return methods, ", ".join([*numbers, *(f"{key} {word}" for key, word in words.items())])


def _collect(key: str, value: Any, values: dict[str, list[float]], words: dict[str, str]) -> None:
    if isinstance(value, float):
        values.setdefault(key, []).append(value)
    elif value not in (False, None, "tensor"):
        words[key] = str(value).lower()
