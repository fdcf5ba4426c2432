"""The recipes of recipes/: those of benchmarks/parity.py, and mergekit's examples (name -> text)."""

from __future__ import annotations

from pathlib import Path

import yaml

_FOLDER = Path(__file__).parent / "recipes"
EXAMPLES: dict[str, str] = yaml.safe_load((_FOLDER / "mergekit_examples.yaml").read_text(encoding="utf-8"))
RECIPES: list[tuple[str, str, str]] = [  # (method, idea, recipe)
    (method, idea, f"{body}merge_method: {method}\ndtype: float32\n")
    for method, ideas in yaml.safe_load((_FOLDER / "parity.yaml").read_text(encoding="utf-8")).items()
    for idea, body in ideas.items()
]
