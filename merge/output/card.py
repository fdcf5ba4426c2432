"""README.md of the output: a model card with the Hub's metadata, what was merged, and the recipe."""

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
) -> str:
    """Markdown with a YAML head. Only hub ids are named as base models there; local directories go by their name."""
    hub = [model.ref for model in models if model.revision is not None]
    library, what = ("peft", "LoRA adapters") if adapter else ("transformers", "pre-trained language models")
    head = ["---", f"library_name: {library}", "pipeline_tag: text-generation"]
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
