"""Pieces of the pages that commands write: one HTML file, no scripts, nothing fetched. The style is page.html."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape
from importlib.resources import files
from string import Template


def html_document(title: str, parts: Iterable[str]) -> str:
    """The whole page; parts are HTML, and empty ones are left out."""
    template = Template(files("merge.show").joinpath("page.html").read_text(encoding="utf-8"))
    return template.substitute(title=escape(title), body="\n".join(filter(None, parts)))


def html_row(name: str, values: Iterable[str], marked: bool = False) -> str:
    """A row of a table: a name, and cells in HTML."""
    kind = ' class="merge"' if marked else ""
    return f'<tr{kind}><th scope="row">{escape(name)}</th>' + "".join(f"<td>{v}</td>" for v in values) + "</tr>"


def html_table(heads: Sequence[str], rows: Sequence[str], caption: str = "", kind: str = "") -> str:
    """A table that scrolls sideways where it is too wide; heads and caption are HTML."""
    said = f'<p class="soft">{caption}</p>' if caption else ""
    head = "".join(f'<th scope="col">{text}</th>' for text in heads)
    body = "\n".join(rows)
    named = f' class="{kind}"' if kind else ""
    region = '<div class="scroll" tabindex="0" role="region" aria-label="table, scrolls sideways">'  # by keyboard too
    return f"{region}<table{named}>{said}<thead><tr>{head}</tr></thead><tbody>\n{body}\n</tbody></table></div>"


def html_figure(title: str, plot: str, more: str = "") -> str:
    """A plot with its title; `more` is said softly after it."""
    after = f' <span class="soft">{escape(more)}</span>' if more else ""
    return f"<figure><figcaption>{escape(title)}{after}</figcaption>{plot}</figure>"
