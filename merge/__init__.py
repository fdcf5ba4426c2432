"""Merges language models: streamed from disk to disk, exact, resumable.

recipe = load_recipe("recipes/ties.yaml")
plan = build_plan(recipe)
run_plan(plan, "merged/ties")
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from merge.diff import diff_models
    from merge.engine.pipeline import run_pipeline
    from merge.engine.run import run_plan
    from merge.methods import method
    from merge.output.verify import verify_output
    from merge.planners.build import build_plan
    from merge.planners.convert import convert_plan
    from merge.recipe import load_recipe, parse_recipe
    from merge.recipe.pipeline import load_pipeline, parse_pipeline
    from merge.user_methods import load_method_file

__all__ = [
    "build_plan",
    "convert_plan",
    "diff_models",
    "load_method_file",
    "load_pipeline",
    "load_recipe",
    "method",
    "parse_pipeline",
    "parse_recipe",
    "run_pipeline",
    "run_plan",
    "verify_output",
]
_HOMES = {
    "build_plan": "merge.planners.build",
    "convert_plan": "merge.planners.convert",
    "diff_models": "merge.diff",
    "load_pipeline": "merge.recipe.pipeline",
    "parse_pipeline": "merge.recipe.pipeline",
    "run_pipeline": "merge.engine.pipeline",
    "load_method_file": "merge.user_methods",
    "load_recipe": "merge.recipe",
    "method": "merge.methods",
    "parse_recipe": "merge.recipe",
    "run_plan": "merge.engine.run",
    "verify_output": "merge.output.verify",
}


def __dir__() -> list[str]:
    """What `help(merge)` and completion show: the functions too that are not imported yet."""
    return sorted({*globals(), *__all__})


def __getattr__(name: str) -> Any:
    """Imports a verb when it is first used: `merge --help` should not wait for numba."""
    if name in _HOMES:
        import importlib

        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
