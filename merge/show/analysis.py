"""`merge analyse` in a terminal: findings, models, pairs, roles, layers, suggestions."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from merge.show.terminal import console, number, percent, printable

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from merge.tools.analyse.results import AnalysedGroup, Analysis

_BAR = 24
TRIMMED = 2  # of the densities: the measures that are shown after trimming


def print_analysis(analysis: Analysis) -> None:
    out = console()
    names = short_names(analysis.models)
    for finding in analysis.findings:
        out.print(f"{finding.level:<8} {finding.what}: {printable(finding.text)}", soft_wrap=True)
    if analysis.findings:
        out.print()
    whole = analysis.group()
    if whole is None:
        return
    out.print(_models(analysis, whole, names))
    if analysis.pairs:
        out.print()
        out.print(_pairs(analysis, whole, names))
    out.print()
    out.print(_groups(analysis, [(role, group) for role in analysis.roles if (group := analysis.group(role))], "role"))
    if analysis.layers:
        out.print()
        _layers(analysis, out)
    if analysis.suggestions:
        out.print()
    for each in analysis.suggestions:
        out.print(printable(f"{each.about:<9} {each.text}"), soft_wrap=True)
        out.print(printable(f"          {each.reason} ({each.source})"), soft_wrap=True)


def short_names(names: Sequence[str]) -> list[str]:
    """The last part of each path, where that tells all of them apart."""
    short = [name.rstrip("/").rpartition("/")[2] or name for name in names]
    return [printable(name) for name in (short if len(set(short)) == len(short) else names)]


def _models(analysis: Analysis, whole: AnalysedGroup, names: Sequence[str]) -> Table:
    from rich.table import Table

    share = f"top {analysis.densities[TRIMMED]:.0%}"
    heads = ("model", "|d|/|b|", "changed", "lost in bf16", f"at 1/{len(names)}", share, "eff. rank", "delta")
    table = Table(*heads, box=None, pad_edge=False)
    for name, one, rank, look in zip(
        names, whole.measures.models, whole.spectra.effective_rank, analysis.looks, strict=True
    ):
        values = (percent(one.changed), percent(one.lost), percent(one.lost_at_share), percent(one.energy[TRIMMED]))
        table.add_row(name, number(one.relative), *values, number(rank), printable(look.text))
    return table


def _pairs(analysis: Analysis, whole: AnalysedGroup, names: Sequence[str]) -> Table:
    from rich.table import Table

    least = f"at {analysis.densities[TRIMMED]:.0%}"
    heads = ("pair", "cosine", "sign conflict", least, "cancelled", least, "same top", "left", "right", "interference")
    table = Table(*heads, box=None, pad_edge=False)
    spectra = whole.spectra
    for place, ((i, j), pair) in enumerate(zip(analysis.pairs, whole.measures.pairs, strict=True)):
        table.add_row(
            f"{names[i]}, {names[j]}",
            cosine(pair.cosine),
            percent(pair.conflict[0]),
            percent(pair.conflict[TRIMMED]),
            percent(pair.cancelled[0]),
            percent(pair.cancelled[TRIMMED]),
            percent(pair.overlap[TRIMMED]),
            number(spectra.left[place]),
            number(spectra.right[place]),
            number(spectra.pair_interference[place]),
        )
    if spectra.chance is not None:
        table.caption = f"left, right: overlap of the leading singular vectors; by chance {spectra.chance:.2g}"
    return table


def _groups(analysis: Analysis, groups: Sequence[tuple[str, AnalysedGroup]], title: str) -> Table:
    from rich.table import Table

    several = len(analysis.models) > 1
    heads = (title, "tensors", "|d|/|b|", "eff. rank")
    more = ("cosine", "sign conflict", "cancelled", "left", "right", "interference") if several else ()
    table = Table(*heads, *more, box=None, pad_edge=False)
    for name, group in groups:
        of_pairs = (
            cosine(average(group, lambda g: [pair.cosine for pair in g.measures.pairs])),
            percent(average(group, lambda g: [pair.conflict[0] for pair in g.measures.pairs])),
            percent(group.measures.cancelled[0]),
            number(average(group, lambda g: g.spectra.left)),
            number(average(group, lambda g: g.spectra.right)),
            number(group.spectra.interference),
        )
        relative = number(average(group, lambda g: [model.relative for model in g.measures.models]))
        rank = number(average(group, lambda g: g.spectra.effective_rank))
        table.add_row(name, str(group.tensors), relative, rank, *(of_pairs if several else ()))
    if several:
        table.caption = "means over the models, and over their pairs"
    return table


def _layers(analysis: Analysis, out: Console) -> None:
    """Bars of |d|/|b|, mean over the models, and the mean cosine of their deltas."""
    groups = [(layer, group) for layer in analysis.layers if (group := analysis.group(layer=layer))]
    values = [average(group, lambda g: [model.relative for model in g.measures.models]) or 0.0 for _, group in groups]
    longest, width = max(values) or 1.0, len(str(groups[-1][0]))
    out.print("layer: |d|/|b|" + (", cosine of the deltas" if analysis.pairs else ""))
    for (layer, group), value in zip(groups, values, strict=True):
        alike = cosine(average(group, lambda g: [pair.cosine for pair in g.measures.pairs]))
        out.print(f"{layer:>{width}} {'█' * round(_BAR * value / longest):<{_BAR}} {value:.3g}  {alike}")


def average(group: AnalysedGroup, values: Callable[[AnalysedGroup], Sequence[float | None]]) -> float | None:
    """Of those that are defined"""
    known = [value for value in values(group) if value is not None]
    return sum(known) / len(known) if known else None


def cosine(value: float | None) -> str:
    return "" if value is None else f"{value:+.2f}"
