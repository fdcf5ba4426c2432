"""Merges language models: streamed from disk to disk, exact, resumable.

recipe = load_recipe("recipes/ties.yaml")
plan = build_plan(recipe)
run_plan(plan, "merged/ties")
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from merge.engine.run import run_plan
    from merge.jobs.build import build_plan
    from merge.jobs.pipelines.run import run_pipeline
    from merge.methods import method
    from merge.methods.method_file import load_method_file
    from merge.output.verify import verify_output
    from merge.planning.load import load_pipeline, load_recipe, parse_pipeline, parse_recipe
    from merge.tools.convert import convert_plan
    from merge.tools.diff import diff_models

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
    "build_plan": "merge.jobs.build",
    "convert_plan": "merge.tools.convert",
    "diff_models": "merge.tools.diff",
    "load_pipeline": "merge.planning.load",
    "parse_pipeline": "merge.planning.load",
    "run_pipeline": "merge.jobs.pipelines.run",
    "load_method_file": "merge.methods.method_file",
    "load_recipe": "merge.planning.load",
    "method": "merge.methods",
    "parse_recipe": "merge.planning.load",
    "run_plan": "merge.engine.run",
    "verify_output": "merge.output.verify",
}


def __dir__() -> list[str]:
    """Names for `help(merge)` and completion, including functions that are not imported yet."""
    return sorted({*globals(), *__all__})


def __getattr__(name: str) -> Any:
    """Imports a function on first use, so that `merge --help` does not wait for numba."""
    if name in _HOMES:
        import importlib

        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
