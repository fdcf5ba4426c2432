"""The floor plan of the tree: what the core must not know."""

from __future__ import annotations

import ast
import runpy
from pathlib import Path

from merge.methods import all_methods

ROOT = Path(__file__).parents[1]
MERGE = ROOT / "merge"
CORE = [MERGE / "plan.py", *sorted((MERGE / "engine").glob("*.py"))]


def test_the_core_names_no_method() -> None:
    named = {
        f"{path.name}: {node.value}"
        for path in CORE
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Constant) and node.value in all_methods()
    }
    assert not named


def test_no_files_import_each_other() -> None:
    """Functions' own imports counted; those for types alone are not."""
    plan = runpy.run_path(str(ROOT / "benchmarks" / "floor_plan.py"))
    assert plan["circles"](plan["imports"](plan["modules"](), typing_too=False)) == []


def test_no_room_imports_one_above_it() -> None:
    plan = runpy.run_path(str(ROOT / "benchmarks" / "floor_plan.py"))
    assert plan["arrows_back"](plan["imports"](plan["modules"]())) == []


def test_merge_without_its_commands_knows_no_package_above_it() -> None:
    """merge/ imports neither finetune nor eval, but for merge/cli; finetune/ and eval/ import no command."""
    plan = runpy.run_path(str(ROOT / "benchmarks" / "floor_plan.py"))
    above = {"merge": ("finetune", "eval"), "finetune": ("merge.cli", "eval"), "eval": ("merge.cli",)}
    found = [
        f"{name} imports {other}"
        for name, others in plan["imports"](plan["modules"]()).items()
        for other in sorted(others)
        if not f"{name}.".startswith("merge.cli.")
        and any(f"{other}.".startswith(f"{each}.") for each in above[name.split(".")[0]])
    ]
    assert found == []


def test_no_class_has_the_name_of_another() -> None:
    plan = runpy.run_path(str(ROOT / "benchmarks" / "floor_plan.py"))
    trees = [ast.parse(path.read_text(encoding="utf-8")) for path in plan["modules"]().values()]
    assert plan["used_twice"](trees) == []
