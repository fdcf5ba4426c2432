"""The floor plan of the tree: what the core must not know."""

from __future__ import annotations

import ast
import runpy
from pathlib import Path

from merge.methods import all_methods

ROOT = Path(__file__).parents[1]
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


# Files that import each other, functions' own imports counted. The list only gets shorter.
CIRCLES = [
    {"merge.methods", "merge.methods.registry", "merge.user_methods"},
    {"merge.cli.generate", "merge.cli.talk"},
    {"merge.cli.pipelines", "merge.cli.plan", "merge.cli.run"},
    {"eval.tasks", "eval.tasks.jsonl", "eval.tasks.text"},
    {
        *("finetune.bottleneck", "finetune.data", "finetune.record", "finetune.objectives"),
        *("finetune.objectives.distillation", "finetune.objectives.judged", "finetune.objectives.preference"),
    },
]


def test_no_new_circle_of_imports() -> None:
    plan = runpy.run_path(str(ROOT / "benchmarks" / "floor_plan.py"))
    found = plan["circles"](plan["imports"](plan["modules"](), typing_too=False))
    assert [circle for circle in found if not any(known.issuperset(circle) for known in CIRCLES)] == []
