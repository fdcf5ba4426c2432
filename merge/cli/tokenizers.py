"""merge tokenizers: Show how tokenizers differ."""

from __future__ import annotations

import json
from typing import Any

import click

from merge.cli.options import json_flag, trust_option
from merge.quoting import counted
from merge.show.terminal import printable, show_table


@click.command(
    "tokenizers",
    epilog="""\b
Examples:
  merge tokenizers org/base org/chat
  merge tokenizers org/a org/b org/c --json
All are compared with the first. Each may be a model, or a directory with only a tokenizer.""",
)
@click.argument("models", nargs=-1, required=True)
@json_flag("Print the report as JSON.")
@trust_option
def command(models: tuple[str, ...], as_json: bool) -> None:
    """Show how the tokenizers of MODELS differ.

    Types, sizes, shared and moved tokens, special tokens, merges, chat templates, embedding rows, and the number of
    tokens in sample texts.
    """
    from merge.errors import UsageError
    from merge.recipe.references import parse_reference
    from merge.vocabulary.report import compare, describe

    try:
        refs = [parse_reference(model) for model in models]
    except ValueError as error:
        raise UsageError(f"{error}.") from None
    found = [describe(ref) for ref in refs]
    first = found[0][0]
    comparisons = [compare(first, other) for other, _ in found[1:]]
    if as_json:
        report = {"tokenizers": [facts for _, facts in found], "comparisons": comparisons}
        click.echo(json.dumps(report, indent=2, ensure_ascii=False))
        return
    _table([facts for _, facts in found])
    for comparison in comparisons:
        _comparison(comparison)


def _table(all_facts: list[dict[str, Any]]) -> None:
    """One column a tokenizer."""
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    table.add_column("")
    for facts in all_facts:
        table.add_column(printable(facts["tokenizer"]), justify="right", overflow="fold")
    for key, label in _ROWS.items():
        table.add_row(label, *(_cell(facts[key]) for facts in all_facts))
    for role in dict.fromkeys(role for facts in all_facts for role in facts["special"]):
        table.add_row(role.replace("_", " "), *(_cell(facts["special"].get(role)) for facts in all_facts))
    for sample in all_facts[0]["tokens_per_byte"]:
        row = [f"{facts['tokens_per_byte'][sample]:.3f}" for facts in all_facts]
        table.add_row(f"tokens per byte, {sample}", *row)
    show_table(table)


_ROWS = {
    "type": "type",
    "alphabet": "alphabet",
    "tokens": "tokens",
    "added": "of them added",
    "largest_id": "largest id",
    "embedding_rows": "embedding rows",
    "merges": "merges",
    "normalizer": "normalizer",
    "pre_tokenizer": "pre-tokenizer",
    "chat_template": "chat template",
}


def _cell(value: object) -> str:
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:,}" if isinstance(value, int) else printable(str(value))


def _comparison(found: dict[str, Any]) -> None:
    click.echo(f"\n{printable(found['first'])} and {printable(found['other'])}:")
    if found["same_ids"]:
        click.echo(f"  the same {counted(found['shared'], 'token')} under the same ids")
    else:
        click.echo(f"  {counted(found['shared'], 'token')} in both, {found['moved']:,} of them under another id")
        click.echo(f"  {found['same_text']:,} tokens of the second have the same text as a token of the first")
        for key, label in (("only_first", "only the first"), ("only_other", "only the second")):
            if found[key]:
                samples = " ".join(map(repr, found[f"{key}_samples"]))
                click.echo(f"  {found[key]:,} {label} has: {printable(samples)}")
        for token, ours, theirs in found["moved_samples"][:3]:
            click.echo(f"  {printable(repr(token))} is {ours:,} in the first, {theirs:,} in the second")
    if found["merges_shared"] is not None and (found["merges_only_first"] or found["merges_only_other"]):
        click.echo(
            f"  merges: {found['merges_shared']:,} in both, {found['merges_only_first']:,} only in the first, "
            f"{found['merges_only_other']:,} only in the second"
        )
    for role, (ours, theirs) in found["special"].items():
        click.echo(f"  {role.replace('_', ' ')}: {_cell(ours)} and {_cell(theirs)}")
    if found["differ"]:
        click.echo(f"  differ too: {', '.join(key.replace('_', '-') for key in found['differ'])}")
    if not found["same_chat_template"]:
        click.echo("  the chat templates differ")
