"""The floor plan of the tree: what the core must not know."""

from __future__ import annotations

import ast
from pathlib import Path

from merge.methods import all_methods

MERGE = Path(__file__).parents[1] / "merge"
CORE = [MERGE / "plan.py", *sorted((MERGE / "engine").glob("*.py"))]


def test_the_core_names_no_method() -> None:
    named = {
        f"{path.name}: {node.value}"
        for path in CORE
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Constant) and node.value in all_methods()
    }
    assert not named
