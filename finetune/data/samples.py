"""Turns rows into samples, by format or by templates.

A format is detected from the columns (finetune/data/formats.py), or named; templates in the config make
prompt/completion or text of any columns.
"""

from __future__ import annotations

import string
from collections.abc import Callable, Collection

from finetune.data.contents import Content, Sample, Text, TextPair
from finetune.data.files import Row
from finetune.data.formats import FORMATS, Format, detect, names, text_of, unread
from finetune.keys import Config, DataSource
from merge.errors import UsageError
from merge.schema.names import suggest


def make_samples(rows: list[Row], source: DataSource, config: Config, notes: list[str]) -> list[Sample]:
    """One sample a row. `notes`: gets the columns that are not used.

    Raises:
        UsageError: columns or template fields that the data does not have, columns that would be lost, values of a
            wrong kind; with their place.
    """
    ignored = {*source.ignore_columns, *config.ignore_columns}
    rows = [Row(row.place, {k: v for k, v in row.columns.items() if k not in ignored}) for row in rows]
    if templates := _templates(rows[0], source, config):
        read, used, by = templates
        left = dict.fromkeys(column for row in rows for column in row.columns if column not in used)
    else:
        form = _format(rows[0], source, config)
        for row in rows:
            form.check(row)
        read, by = form.read, f"format {form.name}"
        left = dict.fromkeys(column for row in rows for column in unread(form, row))
    if left:
        notes.append(f"data {source.path}: {by}; columns not used: {names(left)}")
    return [Sample(row.place, source.task, read(row)) for row in rows]


def _templates(
    first: Row, source: DataSource, config: Config
) -> tuple[Callable[[Row], Content], Collection[str], str] | None:
    """(reader, the columns it reads, its name); templates of the data entry take precedence over the config's, and
    both before formats."""
    if source.text is not None or (config.text is not None and source.prompt is None and source.format is None):
        text = Template(source.text or config.text or "", "text", first)
        return lambda row: Text(text(row)), text.columns, "template"
    level = source if source.prompt is not None else config
    if level.prompt is None or source.format is not None:
        return None
    prompt, completion = (
        Template(level.prompt, "prompt", first),
        Template(level.completion or "", "completion", first),
    )
    return lambda row: TextPair(prompt(row), completion(row)), prompt.columns | completion.columns, "templates"


def _format(first: Row, source: DataSource, config: Config) -> Format:
    """The named format, or the detected one."""
    name = source.format or config.format
    if name is None:
        return detect(first)
    if not FORMATS[name].fits(first):
        wanted = ", ".join(column.replace("|", " or ") for column in FORMATS[name].needs)
        raise UsageError(
            f"data {first.place}: format {name} needs the columns {wanted}; found: {names(first.columns)}."
        )
    return FORMATS[name]


class Template:
    """`"Q: {question}"`: columns in braces; {{ and }} are braces."""

    def __init__(self, text: str, key: str, first: Row) -> None:
        self.text, self.key = text, key
        try:
            parts = list(string.Formatter().parse(text))
        except ValueError as error:
            raise UsageError(f'{key} template "{text}": {error}; write {{{{ for a brace.') from None
        for _, name, form, turned in parts:
            if form or turned:
                raise UsageError(f'{key} template "{text}": write {{{name}}} alone; columns are inserted unchanged.')
        self.parts = [(before, name) for before, name, _, _ in parts]
        for name in filter(None, (name for _, name in self.parts)):
            if name not in first.columns:
                hint = suggest(name, list(first.columns))
                raise UsageError(f'{key} template: unknown field "{{{name}}}" in {first.place}; {hint}')
        if any(name == "" for _, name in self.parts):
            raise UsageError(f'{key} template "{text}": empty braces; name a column, or write {{{{}}}}.')

    @property
    def columns(self) -> set[str]:
        return {name for _, name in self.parts if name}

    def __call__(self, row: Row) -> str:
        return "".join(before + (text_of(row, name) if name else "") for before, name in self.parts)
