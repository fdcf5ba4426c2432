"""README.md of the output: a model card with the Hub's metadata, what was merged, and the recipe.

An evaluation may be added later, between marks in the YAML head and in the text. What stands between the marks is
not part of the merge: `merge verify` compares the card without it, and taking it out gives the card that was written.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable

from merge.methods import Method
from merge.plan import SourceModel
from merge.recipe.model import Recipe


def model_card(
    recipe: Recipe,
    name: str,
    method: Method,
    models: list[SourceModel],
    base: int | None,
    used: Iterable[str] = (),
    adapter: bool = False,
    task: str | None = None,
) -> str:
    """Markdown with a YAML head, which lists hub ids as base models; local directories appear by their name.

    Args:
        used: names of the methods of all tensors.
        task: the hub's pipeline tag, see merge/output/task.py.
    """
    hub = [model.ref for model in models if model.revision is not None]
    library, what = ("peft", "LoRA adapters") if adapter else ("transformers", "pre-trained language models")
    library = "sentence-transformers" if task == "sentence-similarity" else library
    head = ["---", f"library_name: {library}", *([f"pipeline_tag: {task}"] if task else [])]
    if hub:
        head += [
            "base_model:",
            *(f"- {json.dumps(name)}" for name in dict.fromkeys(re.split("[@+]", ref)[0] for ref in hub)),
        ]
    head += ["tags:", "- merge", "- merge-workbench", f"- {method.name}", "---"]
    paper = f" ({method.paper})" if method.paper else ""
    others = [other for other in dict.fromkeys(used) if other not in (method.name, "copy", "passthrough")]
    also = f"; in some parts {', '.join(others)}" if others else ""
    lines = [
        *head,
        "",
        f"# {name}",
        "",
        f"A merge of {what}, made with Merge Workbench.",
        "",
        f"**Method:** {method.name}{paper}{also}",
        "",
        f"    {method.formula}",
        "",
        "**Models:**",
        "",
        *(f"* {model.ref}{' (base)' if i == base else ''}" for i, model in enumerate(models)),
        "",
        "**Recipe:**",
        "",
        "```yaml",
        recipe.text.rstrip(),
        "```",
        "",
        "`merge_manifest.json` has the digests of every input and output tensor; `merge verify` checks them.",
        "",
    ]
    return "\n".join(lines)


_MARKS = {
    "head": ("# evaluation: begin\n", "# evaluation: end\n"),
    "body": ("<!-- evaluation: begin -->\n", "<!-- evaluation: end -->\n"),
}


def without_evaluation(card: str) -> str:
    """The card without its evaluation."""
    for marks in _MARKS.values():
        begin, end = (re.escape(mark.strip()) + r"\r?\n" for mark in marks)
        card = re.sub(rf"^{begin}.*?^{end}", "", card, flags=re.MULTILINE | re.DOTALL)
    return card


def with_evaluation(card: str, metadata: str, text: str) -> str:
    """The card with an evaluation, which replaces an earlier one.

    Args:
        card: Markdown, with or without a YAML head.
        metadata: YAML lines for the head; left out if the head already has these keys, or there is no head.
        text: Markdown.

    Lines end as the card's do.
    """
    crlf = "\r\n" in card
    card = without_evaluation(card.replace("\r\n", "\n"))
    if card and not card.endswith("\n"):
        card += "\n"
    found = re.match(r"---\n(?P<yaml>.*?)^---\n", card, flags=re.MULTILINE | re.DOTALL)
    keys = set(re.findall(r"^[\w-]+(?=:)", metadata, flags=re.MULTILINE))
    if found and metadata and not keys & set(re.findall(r"^[\w-]+(?=:)", found["yaml"], flags=re.MULTILINE)):
        begin, end = _MARKS["head"]
        place = found.end("yaml")
        card = card[:place] + begin + metadata.rstrip("\n") + "\n" + end + card[place:]
    begin, end = _MARKS["body"]
    card = card + begin + text.rstrip("\n") + "\n" + end
    return card.replace("\n", "\r\n") if crlf else card
