"""Prints a plan as tables, the resources that it takes, and the report of a run."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from merge.quoting import counted
from merge.show.stack import pictures
from merge.show.terminal import console, memory, printable, show_table, size

if TYPE_CHECKING:
    from rich.table import Table

    from merge.engine.run import Report
    from merge.plan import Experts, Plan, Step


def totals_of(plan: Plan, out: Path, threads: int | None, max_ram: int | None, device: str) -> dict[str, int]:
    """Resources of a run of the plan: bytes read and written, memory, threads, free disk space."""
    from merge.engine.memory import budget
    from merge.engine.space import bytes_free

    needs = budget(plan, threads, max_ram, device)
    return {
        "parameters": plan.n_parameters,
        **({"active_parameters": plan.experts.active} if plan.experts else {}),
        "bytes_read": plan.bytes_read,
        "bytes_written": plan.bytes_written,
        "peak_memory": needs.peak,
        "threads": needs.threads,
        **_matrix_work(plan, needs.threads, device),
        "disk_free": bytes_free(out),
    }


def _matrix_work(plan: Plan, threads: int, device: str) -> dict[str, int]:
    """Cost of methods that decompose matrices, from measurements on one core; nothing for other plans"""
    from merge.engine.costs import work

    steps = [(step, cost) for step in plan.steps if (cost := work(step)) != (0.0, 0)]
    if not steps:
        return {}
    seconds = sum(cost[0] for _, cost in steps)
    longest = max(cost[0] for _, cost in steps)
    return {
        "matrix_tensors": len(steps),
        "matrix_seconds": round(max(longest, seconds / threads)) if device == "cpu" else 0,
        "matrix_memory": max(cost[1] for _, cost in steps),
    }


def show_plan(plan: Plan, totals: dict[str, int] | None, tensors: bool, heading: str = "") -> None:
    """Tables of one plan, for people; without totals for a stage that is not carried out by itself."""
    from rich.table import Table
    from rich.text import Text

    out = console()
    origin = f" ({printable(plan.method_origin)})" if plan.method_origin else ""
    method = f"mixture of experts, {plan.experts.layout}" if plan.experts else plan.method
    out.print(
        Text.assemble(heading, (printable(plan.name), "bold"), f": {method}{origin}, seed {plan.seed}"),
        soft_wrap=True,
    )
    models = Table("model", "role", "files", "size", box=None, pad_edge=False)
    for i, model in enumerate(plan.models):
        role = "base" if i == plan.base_model else "input"
        files = (str(len(model.files)), size(sum(file.size for file in model.files)))
        models.add_row(model.ref, role, *(files if model.files else ("", "streamed")))
    show_table(models, out)
    out.print()
    picture = list(pictures(plan, out.width))
    for line in picture:
        out.print(line, soft_wrap=True)
    if picture:
        out.print()
    if tensors:
        show_table(_tensor_table(plan), out)
    else:
        table, remarks = _layer_table(plan)
        show_table(table, out)
        for remark in remarks:
            out.print(remark)
    out.print()
    if totals is not None:
        _show_totals(plan, totals, out)
    for note in plan.notes:
        out.print(f"note     {printable(note)}", soft_wrap=True)


def _show_totals(plan: Plan, totals: dict[str, int], out: Any) -> None:
    n_bytes = f"{size(totals['bytes_written'])} in {counted(len(plan.shards), 'file')}"
    out.print(f"result   {counted(len(plan.steps), 'tensor')}, {counted(totals['parameters'], 'parameter')}, {n_bytes}")
    if plan.experts is not None:
        out.print(f"experts  {_experts(plan.experts, plan)}")
    out.print(f"reads    {size(totals['bytes_read'])} (later passes read from the disk cache)")
    out.print(f"memory   at most {memory(totals['peak_memory'])} with {counted(totals['threads'], 'thread')}")
    if "matrix_tensors" in totals:
        took = f"about {_duration(totals['matrix_seconds'])}, " if totals["matrix_seconds"] else ""
        held = f"up to {memory(totals['matrix_memory'])} for each thread"
        out.print(f"matrices {took}{counted(totals['matrix_tensors'], 'matrix', 'matrices')} to decompose, {held}")
    short = totals["disk_free"] < totals["bytes_written"]
    out.print(f"disk     {size(totals['bytes_written'])} needed, {size(totals['disk_free'])} free", end="")
    out.print("  not enough" if short else "", style="bold red")


def _experts(experts: Experts, plan: Plan) -> str:
    """`8 in each of 32 layers, 2 for each token: 12,879,925,248 active parameters`"""
    shared = " and a shared one" if experts.n_shared else ""
    layers = counted(experts.n_layers, "layer")
    text = f"{experts.n_experts}{shared} in each of {layers}, {experts.per_token} for each token: "
    text += f"{experts.active:,} active parameters"
    from merge.findings.router import RouterPrompts

    prompts = [prompt for each in plan.findings if isinstance(each, RouterPrompts) for prompt in each.prompts]
    if not prompts:
        return text
    of = f"{counted(len(prompts), 'prompt')} of {counted(sum(map(len, prompts)), 'token')}"
    return f"{text}; {of} run through the base first"


def _duration(seconds: int) -> str:
    if seconds < 100:
        return f"{seconds} s"
    return f"{round(seconds / 60)} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"


def _tensor_table(plan: Plan) -> Table:
    from rich.table import Table

    table = Table("tensor", "shape", "dtype", "method", "inputs and parameters", box=None, pad_edge=False)
    for step in plan.steps:
        shape = "x".join(str(n) for n in step.shape) or "scalar"
        table.add_row(printable(step.name), shape, step.dtype, step.method, printable(_sources(plan, step)))
    return table


def _sources(plan: Plan, step: Step) -> str:
    """`expert-a weight 0.5 density 0.3 + expert-b ...; t 0.5`: parameters that differ from the method's defaults"""
    from merge.methods import get_method

    method = get_method(step.method)
    defaults = {p.name: p.default for p in method.parameters if not p.required} if method else {}
    parts = []
    for place, model in enumerate(step.models):
        own = [
            f"{k} {_number(v[place])}"
            for k, v in step.parameters.items()
            if isinstance(v, tuple) and v[place] != defaults.get(k)
        ]
        ref = step.inputs[place]
        name = _short(plan, model) + (f":{ref.name}" if ref.name != step.name else "")
        parts.append(" ".join([name, *own]))
    shared = [
        f"{key} {_number(value)}"
        for key, value in step.parameters.items()
        if not isinstance(value, tuple) and value != defaults.get(key)
    ]
    return " + ".join(parts) + (f"; {' '.join(shared)}" if shared else "")


def _number(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value).lower()


Numbers = dict[str, tuple[float, float]]  # parameter -> smallest and largest value among some tensors
_MOST_ROWS = 16


def _layer_table(plan: Plan) -> tuple[Table, list[str]]:
    """One row for each run of layers that are treated alike, and lines below it: what is the same everywhere."""
    from rich.table import Table

    rows = [_Row(label, steps, plan) for label, steps in _by_layer(plan)]
    keys = dict.fromkeys(key for row in rows for key in row.numbers)
    constant = [
        key for key in keys if len({row.numbers.get(key) for row in rows}) == 1 and _is_point(rows[0].numbers[key])
    ]
    varying = [key for key in keys if key not in constant]
    folded = _fold(rows, varying)
    shown = folded if len(folded) <= _MOST_ROWS else [folded[i * (len(folded) - 1) // 11] for i in range(12)]
    origins = any(row.origin for row in rows)
    table = Table(
        "layers", *(["from"] if origins else []), "tensors", "size", "method", *varying, box=None, pad_edge=False
    )
    for row in shown:
        values = [_span(row.numbers.get(key)) for key in varying]
        table.add_row(
            row.label,
            *([row.origin_text()] if origins else []),
            str(row.tensors),
            size(row.nbytes),
            row.methods,
            *values,
        )
    remarks = []
    if len(shown) < len(folded):
        remarks.append(f"(12 of {len(folded)} rows; --tensors shows every tensor)")
    if constant:
        remarks.append("everywhere: " + ", ".join(f"{key} {_span(rows[0].numbers[key])}" for key in constant))
    return table, remarks


class _Row:
    """One layer, or several equal ones in a row."""

    def __init__(self, label: str, steps: list[Step], plan: Plan) -> None:
        self.first = self.last = label
        self.tensors, self.nbytes = len(steps), sum(step.nbytes for step in steps)
        self.methods = " ".join(dict.fromkeys(step.method for step in steps))
        self.numbers = _numbers(plan, steps)
        self.origin = _origin(plan, label, steps)
        self.origin_last = self.origin

    @property
    def label(self) -> str:
        return self.first if self.first == self.last else f"{self.first} to {self.last}"

    def origin_text(self) -> str:
        if self.origin is None or self.origin_last is None:
            return ""
        (model, first), (_, last) = self.origin, self.origin_last
        return f"{model} {first}" if first == last else f"{model} {first} to {last}"

    def follows(self, other: _Row, keys: list[str]) -> bool:
        """Whether this layer is treated like those of the previous row."""
        alike = self.methods == other.methods and all(self.numbers.get(k) == other.numbers.get(k) for k in keys)
        if not alike or "other" in (self.first, other.first):
            return False
        if self.origin is None or other.origin_last is None:
            return self.origin == other.origin_last
        return self.origin == (other.origin_last[0], other.origin_last[1] + 1)


def _fold(rows: list[_Row], keys: list[str]) -> list[_Row]:
    folded: list[_Row] = []
    for row in rows:
        if folded and row.follows(folded[-1], keys):
            before = folded[-1]
            before.last, before.origin_last = row.last, row.origin_last
            before.tensors, before.nbytes = before.tensors + row.tensors, before.nbytes + row.nbytes
        else:
            folded.append(row)
    return folded


def _by_layer(plan: Plan) -> Iterator[tuple[str, list[Step]]]:
    """("other" or the layer's number, its steps), in the order of the layers."""
    from merge.architecture import find_stacks, main_stack

    stack = main_stack(find_stacks((step.name for step in plan.steps), {}), {})
    groups: dict[str, list[Step]] = {}
    for step in plan.steps:
        place = stack.layer(step.name) if stack else None
        groups.setdefault("other" if place is None else str(place[0]), []).append(step)
    yield from sorted(groups.items(), key=lambda group: -1 if group[0] == "other" else int(group[0]))


def _origin(plan: Plan, label: str, steps: list[Step]) -> tuple[str, int] | None:
    """(model, layer) that a layer of a stack is taken from; None outside the layers, and for merged layers."""
    if label == "other" or any(len(step.inputs) > 1 for step in steps) or plan.experts is not None:
        return None
    number = next(part for part in steps[0].inputs[0].name.split(".") if part.isdecimal())
    return _short(plan, steps[0].models[0]), int(number)


def _short(plan: Plan, model: int) -> str:
    return plan.models[model].ref.rstrip("/").rsplit("/", 1)[-1]


def _numbers(plan: Plan, steps: list[Step]) -> Numbers:
    """Every number that is set, "t" or "expert-a weight", with its range over the steps."""
    found: dict[str, list[float]] = {}
    alike = {(id(step.parameters), step.models): step for step in steps}  # most steps of a layer share their numbers
    for step in alike.values():
        for key, value in step.parameters.items():
            if isinstance(value, tuple):
                for model, one in zip(step.models, value, strict=True):
                    found.setdefault(f"{_short(plan, model)} {key}", []).append(one)
            elif isinstance(value, float):
                found.setdefault(key, []).append(value)
    return {key: (min(values), max(values)) for key, values in found.items()}


def _is_point(span: tuple[float, float]) -> bool:
    return span[0] == span[1]


def _span(span: tuple[float, float] | None) -> str:
    if span is None:
        return ""
    return f"{span[0]:.4g}" if _is_point(span) else f"{span[0]:.4g}..{span[1]:.4g}"


def show_report(plan: Plan, report: Report, elapsed: float | None = None) -> None:
    """Prints what a run did; `elapsed`: seconds of the whole command, where it did nothing else."""
    resumed = f" ({report.resumed_tensors} of them taken from an earlier run)" if report.resumed_tensors else ""
    written = f"{plan.n_parameters:,} parameters, {size(report.bytes_written)}"
    click.echo(f"{printable(report.out)}: {counted(report.tensors, 'tensor')}{resumed}, {written}")
    rate = (report.bytes_read + report.bytes_written) / max(report.seconds, 1e-9)
    seconds = report.seconds if elapsed is None else elapsed
    click.echo(f"{seconds:.1f} s, {size(rate)}/s read and written, peak memory {memory(report.peak_memory)}")
    for entry in report.aligned:
        moved = f"{entry['moved']:,} of {entry['units']:,} units moved"
        layers = counted(entry["layers"], "layer")
        click.echo(f"aligned: {printable(entry['model'])}: {entry['kind']} in {layers}, {moved}")
    for entry in report.quantised:
        noise = entry["rounding"]
        own = max(entry["task_vector"] ** 2 - noise**2, 0.0) ** 0.5 / noise
        click.echo(
            f"quantised: {printable(entry['model'])}: its task vector is {entry['task_vector']:.2g} of the base; "
            f"rounding alone makes about {noise:.2g}, the rest is {own:.1f} of that"
            + (": this merge adds noise" if own < 1 else "")
        )
    if report.adapter is not None:
        least, kept = report.adapter["least"], report.adapter["kept_energy"]
        click.echo(
            f"kept {kept:.2%} of the energy over {report.adapter['modules']} modules; least in "
            f"{printable(least['module'])}, {least['kept_energy']:.2%}"
        )
    if report.nonfinite or report.overflow:
        click.echo(f"allowed by the recipe: {report.nonfinite:,} non-finite values, {report.overflow:,} overflows")
