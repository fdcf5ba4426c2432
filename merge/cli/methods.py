"""merge methods: List the merge methods, or explain one."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import click

from merge.cli.options import json_flag, method_file_option
from merge.show.terminal import console, show_table


@click.command("methods", epilog="\b\nExamples:\n  merge methods\n  merge methods ties")
@click.argument("name", required=False)
@method_file_option
@json_flag("Print as JSON.")
def command(name: str | None, method_files: tuple[Path, ...], as_json: bool) -> None:
    """List the merge methods; with NAME, its parameters, formula, paper and an example recipe."""
    from merge.errors import UsageError
    from merge.methods import all_methods
    from merge.methods.method_file import load_method_file
    from merge.schema.names import suggest

    for file in method_files:
        load_method_file(file)
    methods = all_methods()
    if name is not None and name not in methods:
        raise UsageError(f'unknown method "{name}"; {suggest(name, methods)}')
    if as_json:
        chosen = [methods[name]] if name else list(methods.values())
        click.echo(json.dumps([_as_dict(method) for method in chosen], indent=2))
    elif name:
        _explain(methods[name])
    else:
        _list(methods)


def _as_dict(method: Any) -> dict[str, Any]:
    parameters = [
        {
            "name": p.name,
            "type": p.kind.__name__ if not p.choices else list(p.choices),
            "per_model": p.per_model,
            "required": p.required,
            "default": p.default,
            "range": [p.range.low, p.range.high] if p.range else None,
            "meaning": p.doc,
        }
        for p in method.parameters
    ]
    return {
        "name": method.name,
        "formula": method.formula,
        "paper": method.paper,
        "base": method.base,
        "inputs": method.inputs,
        "reproducible": method.reproducible,
        "models": list(method.n_models),
        "parameters": parameters,
        "example": method.example,
        "origin": method.origin,
    }


_REPRODUCIBLE = {
    "bitwise": "bitwise: the same bytes on every machine, on the CPU, from models of up to float32",
    "bounded": "bounded: equal to rounding on machines whose BLAS or torch take other code",
}


def _list(methods: dict[str, Any]) -> None:
    from rich.table import Table

    table = Table("method", "base", "needs", "reproducible", "what it does", box=None, pad_edge=False)
    for method in methods.values():
        names = " ".join(p.name for p in method.parameters if p.required)
        names = "adapters" if method.inputs == "adapters" else "statistics" if method.statistics else names
        table.add_row(method.name, method.base, names, method.reproducible, _title(method))
    show_table(table)


def _title(method: Any) -> str:
    """The first line of the method's file."""
    import sys

    text = sys.modules[method.reference.__module__].__doc__ or ""
    return text.strip().splitlines()[0] if text.strip() else ""


def _paragraphs(text: str) -> str:
    """A docstring with each paragraph on one line, for a terminal of any width; formulas, which are indented, stay."""
    lines: list[str] = []
    for line in text.split("\n"):
        continues = lines and lines[-1] and not lines[-1].startswith(" ") and line and not line.startswith(" ")
        if continues and not re.match(r"[A-Z][\w ]*: ", line):
            lines[-1] += f" {line}"
        else:
            lines.append(line)
    return "\n".join(lines)


def _explain(method: Any) -> None:
    import sys

    from rich.table import Table
    from rich.text import Text

    from merge.methods.registry import MOST_MODELS

    out = console()
    out.print(Text(f"{method.name}\n", style="bold"))
    out.print(Text(_paragraphs((sys.modules[method.reference.__module__].__doc__ or "").strip()) + "\n"))
    low, high = method.n_models
    many = f"{low}" if low == high else f"{low} or more" if high == MOST_MODELS else f"{low} to {high}"
    kind = "LoRA adapters" if method.inputs == "adapters" else "Models"
    out.print(Text(f"{kind}: {many}, base: {method.base}\n"))
    out.print(Text(f"Reproducible: {_REPRODUCIBLE[method.reproducible]}\n"), soft_wrap=True)
    if method.origin:
        out.print(Text(f"From: {method.origin}\n"), soft_wrap=True)
    table = Table("parameter", "for", "type", "default", "meaning", box=None, pad_edge=False)
    for p in method.parameters:
        kind = " | ".join(str(choice).lower() for choice in p.choices) or p.kind.__name__
        if p.range:
            kind += (
                f" >= {p.range.low:g}" if p.range.high == float("inf") else f" in [{p.range.low:g}, {p.range.high:g}]"
            )
        default = "required" if p.required else "none" if p.default is None else str(p.default).lower()
        table.add_row(p.name, "each model" if p.per_model else "the merge", Text(kind), default, p.doc)
    show_table(table, out)
    if method.example:
        out.print(Text("\nExample recipe:\n", style="bold"))
        out.print(Text(method.example.rstrip()))
