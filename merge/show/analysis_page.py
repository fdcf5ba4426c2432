"""`merge analyse` as a page: suggestions, tables, a map of the models, heat maps of layers by roles."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from html import escape

from merge.show.analysis import TRIMMED, average, cosine, short_names
from merge.show.page import html_document, html_figure, html_row, html_table
from merge.show.terminal import number, percent
from merge.tools.analyse.results import AnalysedGroup, Analysis
from merge.tools.analyse.tables import positions

_DEEPEST = 60  # per cent of a heat map's colour, on which text can still be read
_WIDTH, _HEIGHT, _EDGE = 340, 260, 30  # of the map
_SHORT = {"embedding": "emb", "router": "rout", "gate_up": "g/up", "other": "oth"}  # columns are narrow
Values = Callable[[AnalysedGroup], float | None]


@dataclass(frozen=True)
class HeatMap:
    """One measure over layers and roles. `signed`: from -1 to 1, negative ones in another colour."""

    title: str
    more: str
    values: Values
    shown: Callable[[float], str]
    signed: bool = False


def analysis_page(analysis: Analysis) -> str:
    """The whole page."""
    names = short_names(analysis.models)
    title = f"{', '.join(names)} on {short_names([analysis.base])[0]}"
    parts = [f"<h1>{escape(title)}</h1>", _summary(analysis), _suggestions(analysis), _findings(analysis)]
    whole = analysis.group()
    if whole is not None:
        parts += [_models(analysis, whole, names), _pairs(analysis, whole, names), _map(analysis, names)]
        parts += [_energy(analysis, whole, names), _heat_maps(analysis, names), _roles(analysis)]
    if analysis.left_out:
        rows = [html_row(name, [escape(reason)]) for name, reason in analysis.left_out]
        parts.append(
            f"<details><summary>Tensors that were not measured</summary>{_words(['tensor', ''], rows)}</details>"
        )
    return html_document(title, parts)


def _summary(analysis: Analysis) -> str:
    numbers = sum(tensor.sums.size for tensor in analysis.tensors)
    looked = sum(tensor.spectra is not None for tensor in analysis.tensors)
    said = f"{len(analysis.tensors):,} tensors, {numbers:,} numbers; singular values of {looked:,} matrices"
    return f'<p class="soft">d is a model minus the base {escape(analysis.base)}: its delta. {said}.</p>'


def _suggestions(analysis: Analysis) -> str:
    if not analysis.suggestions:
        return ""
    rows = [html_row(s.about, [escape(s.text), escape(s.reason), escape(s.source)]) for s in analysis.suggestions]
    recipe = f"<pre>{escape(analysis.recipe)}</pre>" if analysis.recipe else ""
    note = "They follow from the measures below by simple rules; measure the merge against its parents."
    table = _words(["", "try", "because", "source"], rows)
    return f'<h2>Suggestions</h2><p class="soft">{note}</p>{table}{recipe}'


def _findings(analysis: Analysis) -> str:
    if not analysis.findings:
        return ""
    rows = [html_row(finding.level, [escape(finding.what), escape(finding.text)]) for finding in analysis.findings]
    return f"<h2>To know first</h2>{_words(['', 'about', 'found'], rows)}"


def _words(heads: Sequence[str], rows: Sequence[str]) -> str:
    return html_table([escape(head) for head in heads], rows, kind="words")


def _models(analysis: Analysis, whole: AnalysedGroup, names: Sequence[str]) -> str:
    heads = [
        "model",
        "delta",
        "|d|/|b|",
        "|d|",
        "entries changed",
        "lost in bfloat16",
        f"lost at weight 1/{len(names)}",
    ]
    heads += [f"|d|² in the top {density:.0%}" for density in analysis.densities[1:]]
    heads += ["effective rank", "stable rank"]
    rows = []
    for place, (name, one) in enumerate(zip(names, whole.measures.models, strict=True)):
        values = [f'<span class="phrase">{escape(analysis.looks[place].text)}</span>', number(one.relative)]
        values += [number(one.norm), percent(one.changed)]
        values += [percent(one.lost), percent(one.lost_at_share), *(percent(energy) for energy in one.energy[1:])]
        values += [number(whole.spectra.effective_rank[place]), number(whole.spectra.stable_rank[place])]
        rows.append(html_row(name, values))
    note = (
        "Lost: share of |d| below half a bfloat16 ulp of the base. Ranks are means over matrices: effective "
        "(Σs²)²/Σs⁴, stable Σs²/s₁²."
    )
    return f"<h2>Models</h2>{html_table(heads, rows, note)}"


def _pairs(analysis: Analysis, whole: AnalysedGroup, names: Sequence[str]) -> str:
    if not analysis.pairs:
        return ""
    heads = ["pair", "cosine"]
    heads += [f"sign conflict{_at(density)}" for density in analysis.densities]
    heads += [f"cancelled{_at(density)}" for density in analysis.densities]
    heads += [f"same entries{_at(density)}" for density in analysis.densities[1:]]
    heads += ["shared left directions", "shared right directions", "interference"]
    rows = []
    for place, ((i, j), pair) in enumerate(zip(analysis.pairs, whole.measures.pairs, strict=True)):
        values = [cosine(pair.cosine), *map(percent, pair.conflict), *map(percent, pair.cancelled)]
        values += [
            *map(percent, pair.overlap[1:]),
            number(whole.spectra.left[place]),
            number(whole.spectra.right[place]),
        ]
        rows.append(html_row(f"{names[i]}, {names[j]}", [*values, number(whole.spectra.pair_interference[place])]))
    chance = "" if whole.spectra.chance is None else f" (by chance {whole.spectra.chance:.2g})"
    note = (
        "Sign conflict: of the entries that both change, those with different signs. Cancelled: share of magnitude "
        "that is gone in the sum. Same entries: of the largest of each tensor, those that are among the other's (by "
        f"chance the density). Shared directions: overlap of the leading singular vectors{chance}. Interference: "
        "singular task interference (TSV) over the sum of singular values."
    )
    return f"<h2>Pairs</h2>{html_table(heads, rows, note)}"


def _at(density: float) -> str:
    return "" if density == 1 else f", top {density:.0%}"


def _map(analysis: Analysis, names: Sequence[str]) -> str:
    """Points with numbers; names stand below, where they have room."""
    if len(names) < 2:
        return ""
    points = positions(analysis)
    xs, ys = ([point[axis] for point in points] for axis in (0, 1))
    span = max(max(xs) - min(xs), (max(ys) - min(ys)) * (_WIDTH - 2 * _EDGE) / (_HEIGHT - 2 * _EDGE), 1e-9)
    scale = (_WIDTH - 2 * _EDGE) / span
    middle = ((max(xs) + min(xs)) / 2, (max(ys) + min(ys)) / 2)
    marks, listed = [], []
    for place, (name, (x, y)) in enumerate(zip(names, points, strict=True), 1):
        cx, cy = _WIDTH / 2 + (x - middle[0]) * scale, _HEIGHT / 2 - (y - middle[1]) * scale
        marks.append(f'<circle class="merge" cx="{cx:.1f}" cy="{cy:.1f}" r="5"><title>{escape(name)}</title></circle>')
        marks.append(f'<text x="{cx + 9:.1f}" y="{cy + 4:.1f}">{place}</text>')
        listed.append(f"<li>{escape(name)}</li>")
    label = "Map of the models by the cosine distance of their deltas"
    svg = f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{label}">{"".join(marks)}</svg>'
    figure = html_figure("Map of the models", f"{svg}<ol>{''.join(listed)}</ol>", "near: deltas point the same way")
    note = "Classical scaling of the distances √(2 - 2 cos) between deltas, on their two main axes."
    return f'<h2>Map</h2><p class="soft">{note}</p>{figure}'


def _energy(analysis: Analysis, whole: AnalysedGroup, names: Sequence[str]) -> str:
    curves = [(name, curve) for name, curve in zip(names, whole.spectra.energy, strict=True) if curve is not None]
    if not curves:
        return ""
    rows = [html_row(name, [percent(energy) for energy in curve]) for name, curve in curves]
    heads = ["model", *(f"rank {rank}" for rank in analysis.ranks)]
    note = "Share of |d|² in the largest singular values of a matrix, mean over matrices."
    return f"<h2>Energy by rank</h2>{html_table(heads, rows, note)}"


def _maps(analysis: Analysis, names: Sequence[str]) -> Iterator[HeatMap]:
    for place, name in enumerate(names):
        yield HeatMap(f"|d|/|b| of {name}", "", lambda g, m=place: g.measures.models[m].relative, _percent)  # type: ignore[misc]
    top = f"top {analysis.densities[TRIMMED]:.0%}"
    if analysis.pairs:
        pairs = "mean over pairs"
        yield HeatMap("Cosine of deltas", pairs, _mean(lambda g: [p.cosine for p in g.measures.pairs]), _cosine, True)
        yield HeatMap("Sign conflict", pairs, _mean(lambda g: [p.conflict[0] for p in g.measures.pairs]), _percent)
        conflict = _mean(lambda g: [p.conflict[TRIMMED] for p in g.measures.pairs])
        yield HeatMap("Sign conflict", f"{pairs}, {top}", conflict, _percent)
        yield HeatMap("Cancelled magnitude", "all models", lambda g: g.measures.cancelled[0], _percent)
        yield HeatMap("Cancelled magnitude", f"all models, {top}", lambda g: g.measures.cancelled[TRIMMED], _percent)
        overlap = _mean(lambda g: [p.overlap[TRIMMED] for p in g.measures.pairs])
        yield HeatMap("Same entries", f"{pairs}, {top}", overlap, _percent)
        yield HeatMap("Shared left directions", pairs, _mean(lambda g: g.spectra.left), _percent)
        yield HeatMap("Shared right directions", pairs, _mean(lambda g: g.spectra.right), _percent)
        yield HeatMap("Interference", "all models", lambda g: g.spectra.interference, _number)
    lost = _mean(lambda g: [model.lost_at_share for model in g.measures.models])
    yield HeatMap("Lost in bfloat16", f"at weight 1/{len(names)}, mean over models", lost, _percent)
    yield HeatMap("Effective rank", "mean over models", _mean(lambda g: g.spectra.effective_rank), _number)


def _percent(value: float) -> str:
    if 0 < value < 0.0005:
        return "&lt;.1%"
    return f"{value:.0%}" if value >= 0.095 or not value else f"{value:.1%}"


def _cosine(value: float) -> str:
    return f"{value:+.2f}".replace("0.", ".")


def _number(value: float) -> str:
    return f"{value:.0f}" if value >= 9.95 else f"{value:.1f}"


def _mean(values: Callable[[AnalysedGroup], Sequence[float | None]]) -> Values:
    return lambda group: average(group, values)


def _heat_maps(analysis: Analysis, names: Sequence[str]) -> str:
    places: list[int | None] = [*analysis.layers, *([None] if any(t.layer is None for t in analysis.tensors) else [])]
    cells = {(role, layer): analysis.cell(role, layer) for layer in places for role in analysis.roles}
    figures = [
        html_figure(each.title, _heat(each, analysis.roles, places, cells), each.more)
        for each in _maps(analysis, names)
    ]
    note = "Layers down, roles across; the last row has the tensors outside the layers."
    return f'<h2>Layers and roles</h2><p class="soft">{note}</p><div class="grid">{"".join(figures)}</div>'


def _heat(
    heat: HeatMap,
    roles: Sequence[str],
    layers: Sequence[int | None],
    cells: dict[tuple[str, int | None], AnalysedGroup | None],
) -> str:
    values = {place: None if group is None else heat.values(group) for place, group in cells.items()}
    most = 1.0 if heat.signed else max((abs(value) for value in values.values() if value is not None), default=0.0)
    rows = []
    for layer in layers:
        row = "".join(_cell(values[role, layer], most or 1.0, heat.shown) for role in roles)
        rows.append(f'<tr><th scope="row">{"" if layer is None else layer}</th>{row}</tr>')
    heads = "".join(f'<th scope="col" title="{escape(role)}">{escape(_SHORT.get(role, role))}</th>' for role in roles)
    body = "\n".join(rows)
    return f'<table class="heat"><thead><tr><th></th>{heads}</tr></thead><tbody>\n{body}\n</tbody></table>'


def _cell(value: float | None, most: float, shown: Callable[[float], str]) -> str:
    if value is None:
        return "<td></td>"
    kind = ' class="minus"' if value < 0 else ""
    return f'<td{kind} style="--v:{_DEEPEST * min(abs(value) / most, 1):.0f}">{shown(value)}</td>'


def _roles(analysis: Analysis) -> str:
    groups = [(role, group) for role in analysis.roles if (group := analysis.group(role)) is not None]
    rows = [
        html_row(
            role,
            [
                str(group.tensors),
                number(average(group, lambda g: [model.relative for model in g.measures.models])),
                cosine(average(group, lambda g: [pair.cosine for pair in g.measures.pairs])),
                percent(group.measures.cancelled[0]),
                number(group.measures.equal_length),
                number(average(group, lambda g: g.spectra.effective_rank)),
            ],
        )
        for role, group in groups
    ]
    heads = ["role", "tensors", "|d|/|b|", "cosine", "cancelled", "equal length at weight", "effective rank"]
    note = "Means over models and pairs. At the weight given, the weighted sum of all deltas is as long as one of them."
    return f"<h2>Roles</h2>{html_table(heads, rows, note)}"
