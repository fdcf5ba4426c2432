"""What a plan is, for people: one line for `repr(plan)`, a table for notebooks."""

from __future__ import annotations

from html import escape
from typing import TYPE_CHECKING

from merge.quoting import counted, quoted

if TYPE_CHECKING:
    from merge.plan import Plan


def line(plan: Plan) -> str:
    """`Plan('ties': ties of 3 models, 147 tensors, 1,234,567 parameters, 2,469,134 bytes)`"""
    models = counted(len(plan.models), "model")
    size = f"{counted(len(plan.steps), 'tensor')}, {counted(plan.n_parameters, 'parameter')}"
    return f"Plan({quoted(plan.name)}: {plan.method} of {models}, {size}, {plan.bytes_written:,} bytes)"


def table(plan: Plan) -> str:
    """An HTML table of what a plan reads, does and writes."""
    base = plan.base_model
    models = "<br>".join(escape(model.ref) + (" (base)" * (i == base)) for i, model in enumerate(plan.models))
    methods = dict.fromkeys(step.method for step in plan.steps)
    rows = {
        "method": escape(plan.method),
        "models": models,
        "tensors": f"{len(plan.steps):,} ({escape(', '.join(methods))})",
        "parameters": f"{plan.n_parameters:,}",
        "reads": f"{plan.bytes_read:,} bytes",
        "writes": f"{plan.bytes_written:,} bytes in {counted(len(plan.shards), 'file')}",
        "leniencies": escape(", ".join(plan.allow)),
        "notes": "<br>".join(map(escape, plan.notes)),
    }
    cells = "".join(f"<tr><th>{key}</th><td>{value}</td></tr>" for key, value in rows.items() if value)
    return f"<table><caption>{escape(plan.name)}</caption>{cells}</table>"
