"""merge diff: Show how two models differ, or how alike two fine-tunes of one base are."""

from __future__ import annotations

import json
import math
import sys
from typing import TYPE_CHECKING, Any

import click

from merge.cli.options import json_flag, quiet_option, threads_option
from merge.show.terminal import console, number, percent, printable, progress_bar, show_notes, show_table

if TYPE_CHECKING:
    from rich.table import Table

    from merge.tools.diff import Diff, Sums

_BAR = 40
_MOST_NAMES = 8


@click.command(
    "diff",
    epilog="""\b
Examples:
  merge diff org/base org/finetune
  merge diff math code --base org/base     how alike the two task vectors are
  merge diff before after --exit-code      1 if anything differs""",
)
@click.argument("a")
@click.argument("b")
@click.option("--base", help="The model that both were fine-tuned from: also compare task vectors.")
@click.option("--top", type=click.IntRange(0), default=10, show_default=True, help="Most changed tensors to list.")
@threads_option
@click.option("--exit-code", is_flag=True, help="Exit with 1 if the models differ, as git diff does.")
@quiet_option
@json_flag("Print everything, tensor by tensor, as JSON.")
@click.pass_context
def command(
    ctx: click.Context,
    a: str,
    b: str,
    base: str | None,
    top: int,
    threads: int | None,
    exit_code: bool,
    quiet: bool,
    as_json: bool,
) -> None:
    """Compare models A and B: tensors added, removed, reshaped, changed and by how much; configs; tokenizer files."""
    from merge.adapters.fold import open_model
    from merge.errors import UsageError
    from merge.recipe import parse_reference
    from merge.tools.diff import diff_models

    try:
        refs = [parse_reference(text) for text in (a, b, *([base] if base is not None else []))]
    except ValueError as error:
        raise UsageError(f"{error}.") from None
    total = sum(tensor.nbytes for ref in refs for tensor in open_model(ref).tensors.values())
    with progress_bar("diff", total, quiet or not sys.stderr.isatty()) as progress:
        found = diff_models(*refs, threads=threads, progress=lambda done, _: progress(done))
    show_notes(found.notes, quiet)
    if as_json:
        click.echo(json.dumps(_as_dict(found)))
    else:
        _show(found, a, b, top)
    if exit_code and found.is_different:
        ctx.exit(1)


def _as_dict(found: Diff) -> dict[str, object]:
    kinds = {kind: {"tensors": n, **sums.measures(found.with_base)} for kind, n, sums in found.by_kind()}
    return {
        "different": found.is_different,
        "added": list(found.added),
        "removed": list(found.removed),
        "reshaped": [{"name": name, "a": list(a), "b": list(b)} for name, a, b in found.reshaped],
        "config": [{"key": key, "a": a, "b": b} for key, a, b in found.config],
        "side_files": list(found.side_files),
        "kinds": kinds,
        "layers": [{"layer": layer, **sums.measures(found.with_base)} for layer, sums in found.by_layer()],
        "tensors": [
            {
                "name": tensor.name,
                "kind": tensor.kind,
                "layer": tensor.layer,
                "shape": list(tensor.shape),
                "dtypes": list(tensor.dtypes),
                **tensor.sums.measures(found.with_base),
            }
            for tensor in found.tensors
        ],
    }


def _show(found: Diff, a: str, b: str, top: int) -> None:
    out = console()
    if not found.is_different and not found.with_base:
        out.print(f"no difference: {len(found.tensors)} tensors, config and tokenizer files are the same")
        return
    for what, names in (("added", found.added), ("removed", found.removed)):
        if names:
            out.print(f"{what}    {_some(names)}", soft_wrap=True)
    for name, ours, theirs in found.reshaped:
        out.print(f"reshaped {printable(name)}: {list(ours)} -> {list(theirs)}", soft_wrap=True)
    retyped: dict[tuple[str, str], list[str]] = {}
    for tensor in found.retyped:
        retyped.setdefault(tensor.dtypes, []).append(tensor.name)
    for (stored, other), same in retyped.items():
        out.print(f"dtype    {stored} -> {other}: {_some(same)}", soft_wrap=True)
    for key, ours, theirs in found.config:
        out.print(f"config   {printable(key)}: {_value(ours)} -> {_value(theirs)}", soft_wrap=True)
    if found.side_files:
        out.print(f"files    {_some(found.side_files)}", soft_wrap=True)
    if not found.tensors:
        return
    out.print(f"changed  {len(found.changed)} of {len(found.tensors)} tensors\n")
    show_table(_table([(kind, n, sums) for kind, n, sums in found.by_kind()], found.with_base, "kind"), out)
    if any(sums.changed for _, sums in found.by_layer()):
        out.print()
        _bars(found, out)
    if top and found.changed:
        out.print()
        rows = [(printable(tensor.name), 1, tensor.sums) for tensor in found.changed[:top]]
        show_table(_table(rows, found.with_base, "most changed"), out)
    if found.with_base:
        out.print(f"\nA is {printable(a)}, B is {printable(b)}; |A| and |B| are the norms of their task vectors")


def _table(rows: list[tuple[str, int, Sums]], with_base: bool, title: str) -> Table:
    from rich.table import Table

    several = title == "kind"
    more = ("|A|", "|B|", "cos(A, B)", "same sign") if with_base else ()
    counted = ("tensors",) if several else ()
    table = Table(title, *counted, "changed", "relative", "largest", "cosine", *more, box=None, pad_edge=False)
    for label, n, sums in rows:
        m = sums.measures(with_base)
        keys = ("norm_a", "norm_b", "task_cosine") if with_base else ()
        extra = [number(m[key]) for key in keys] + ([percent(m["sign_agreement"])] if with_base else [])
        cosine = "" if m["cosine"] is None else f"{m['cosine']:.6f}"
        tensors = (str(n),) if several else ()
        table.add_row(label, *tensors, percent(m["share"]), number(m["relative"]), number(m["largest"]), cosine, *extra)
    return table


def _bars(found: Diff, out: Any) -> None:
    """How much each layer changed, and how alike the two task vectors are in it."""
    layers = [(layer, sums.measures(found.with_base)) for layer, sums in found.by_layer()]
    longest = max((r for _, m in layers if math.isfinite(r := float(m["relative"] or 0))), default=0.0) or 1.0
    width = len(str(layers[-1][0]))
    head = "layer: |B - A| / |A|" + (", cosine of the task vectors" if found.with_base else "")
    out.print(head)
    full = max(min(_BAR, out.width - width - (20 if found.with_base else 10)), 1)  # beside the numbers
    for layer, m in layers:
        relative = float(m["relative"] or 0)
        bar = "█" * round(full * min(relative / longest, 1)) if not math.isnan(relative) else ""
        cosine = f"  {number(m['task_cosine'])}" if found.with_base else ""
        out.print(f"{layer:>{width}} {bar:<{full}} {relative:.3g}{cosine}")


def _value(value: object) -> str:
    return "(none)" if value is None else printable(f"{json.dumps(value, ensure_ascii=False):.60}")


def _some(names: Any) -> str:
    shown = ", ".join(printable(name) for name in names[:_MOST_NAMES])
    return shown if len(names) <= _MOST_NAMES else f"{shown} and {len(names) - _MOST_NAMES:,} more"
