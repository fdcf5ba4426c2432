"""Scores every method on the quickstart family, for docs/methods.md.

    python benchmarks/method_scores.py [--items 300]

Merges the family's three experts (reverse, sort, add) with each registered method, scores each merge with
eval.exact_match and writes the table between its markers in docs/methods.md. Recipes say the same for all methods:
weight 1/n, t 0.5, other required parameters as in the method's own example; all others have their defaults. Methods of
two models get reverse and sort, where the first is also the base if the base is an input.
"""

from __future__ import annotations

import argparse
import math
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from docs_tables import built_in, filled

from merge import build_plan, parse_recipe, run_plan
from merge.errors import MergeError
from merge.methods import Method

ROOT = Path(__file__).resolve().parent.parent
DOCUMENT = ROOT / "docs" / "methods.md"
FAMILY = ROOT / "recipes" / "quickstart"
EXPERTS = ("reverse", "sort", "add")
COPIES = "it copies one model"
ADAPTERS = "it merges LoRA adapters"
STATISTICS = "it needs what `merge statistics` collects of each model on a text"


@dataclass(frozen=True)
class Row:
    method: str
    setting: str
    shares: tuple[float, ...]  # of each skill
    average: float
    error: float  # standard error of the average


@dataclass(frozen=True)
class Case:
    """One merge: a recipe without its method, and its settings other than defaults in words."""

    recipe: dict[str, Any]
    setting: str


def cases(method: Method) -> Iterator[Case]:
    """Defaults; the same with the base where it is optional; weight 1 and density 0.5 where they make a difference."""
    experts = EXPERTS if (method.n_models[1] or 3) >= 3 else EXPERTS[:2]
    needed = {p.name: p for p in method.parameters if p.required}
    shared = {name: suggested(method, name) for name in needed if name != "weight"}
    own = {"weight": round(1 / len(experts), 6)} if "weight" in needed else {}
    words = [f"weight 1/{len(experts)}"] * bool(own) + [f"{name} {value}" for name, value in shared.items()]
    words += ["reverse and sort"] * (len(experts) == 2)
    plain: dict[str, Any] = {}
    if method.base == "required":
        plain["base_model"] = place("reverse" if method.base_is_input else "base")
        words += ["reverse as the base"] * method.base_is_input
    elif method.base == "optional":
        words += ["no base"]

    def case(changed: dict[str, Any], more: dict[str, Any], setting: list[str]) -> Case:
        numbers = own | shared | changed
        models = [{"model": place(name)} for name in experts]
        recipe = {"merge_method": method.name, **plain, **more, "models": models, "dtype": "bfloat16"}
        return Case(recipe | ({"parameters": numbers} if numbers else {}), ", ".join(setting) or "defaults")

    yield case({}, {}, words)
    if method.inputs == "either":
        yield case({}, {"base_model": place("base")}, [*(w for w in words if w != "no base"), "from the base"])
    sums = (
        own and len(experts) == 3 and not any(p.name.startswith("normalize") and p.default for p in method.parameters)
    )
    if sums:
        yield case({"weight": 1.0}, {}, ["weight 1"])
    density = method.parameter("density")
    if density is not None and density.default == 1.0 and "no effect" not in density.doc:
        changed, said = ({"weight": 1.0}, ["weight 1"]) if sums else ({}, words)
        yield case(changed | {"density": 0.5}, {}, [*said, "density 0.5"])


def suggested(method: Method, name: str) -> Any:
    """0.5 of what lies between 0 and 1, else as the method's own example has it."""
    parameter = method.parameter(name)
    assert parameter is not None
    if parameter.range is not None and (parameter.range.low, parameter.range.high) == (0.0, 1.0):
        return 0.5
    return (yaml.safe_load(method.example).get("parameters") or {}).get(name)


def place(name: str) -> str:
    return str(FAMILY / name)


def measure(case: Case, out: Path, items: int) -> Row:
    plan = build_plan(parse_recipe(yaml.safe_dump(case.recipe, sort_keys=False)))
    run_plan(plan, out, force=True)
    return scored(out, plan.method, case.setting, items)


def scored(directory: Path, method: str, setting: str, items: int) -> Row:
    from eval.exact_match import average, average_error, score

    scores = score(directory, EXPERTS, items)
    shares = tuple(one.share for one in scores.values())
    return Row(method, setting, shares, average(scores), average_error(scores))


def verdict(row: Row, best: Row) -> str:
    gap, error = row.average - best.average, math.hypot(row.error, best.error)
    word = "about the same" if abs(gap) < 2 * error else "better" if gap > 0 else "**loses**"
    return f"{word} ({100 * gap:+.1f})"


def score_table(rows: list[Row], singles: list[Row], skipped: dict[str, str], items: int) -> str:
    best = max(singles, key=lambda row: row.average)
    worst = max(row.error for row in rows)
    lines = [
        f"Exact match in percent, {items} held-out prompts a skill; the standard error of an average is at most "
        f"{100 * worst:.1f}. The best expert is {best.method}, with {100 * best.average:.1f}.",
        "",
        f"| method | set | {' | '.join(EXPERTS)} | average | against the best expert |",
        f"|---|---|{'---:|' * (len(EXPERTS) + 1)}---|",
    ]
    ordered = sorted(rows, key=lambda row: -row.average)
    lines += [table_row(f"`{row.method}`", row, verdict(row, best)) for row in ordered]
    lines += [table_row(f"*{row.method}*", row, "") for row in singles]
    losing = sorted({row.method for row in rows} - {row.method for row in rows if row.average > best.average})
    lines += ["", f"With no setting above the best expert: {', '.join(losing) or 'none'}."]
    average = max(row.average for row in rows if row.method == "linear")
    below = sorted({row.method for row in rows} - {row.method for row in rows if row.average >= average})
    lines += ["", f"With no setting as good as the plain average, `linear`: {', '.join(below) or 'none'}."]
    if skipped:
        lines += ["", "Not measured: " + "; ".join(f"{name} ({reason})" for name, reason in skipped.items()) + "."]
    return "\n".join(lines)


def table_row(name: str, row: Row, last: str) -> str:
    shares = " | ".join(f"{100 * share:.1f}" for share in (*row.shares, row.average))
    return f"| {name} | {row.setting} | {shares} | {last} |"


def score_all(items: int) -> str:
    rows: list[Row] = []
    skipped: dict[str, str] = {}
    with tempfile.TemporaryDirectory() as folder:
        singles = [scored(FAMILY / name, name, "as it is", items) for name in ("base", *EXPERTS)]
        for method in built_in():
            if method.inputs == "adapters":
                skipped[method.name] = ADAPTERS
                continue
            if method.n_models == (1, 1) or method.statistics is not None:
                skipped[method.name] = COPIES if method.statistics is None else STATISTICS
                continue
            for case in cases(method):
                began = time.monotonic()
                try:
                    rows.append(measure(case, Path(folder) / "merged", items))
                except MergeError as error:
                    raise SystemExit(f"{method.name}, {case.setting}: {error}") from error
                said = f"{method.name}, {case.setting}: {rows[-1].average:.1%}, {time.monotonic() - began:.1f} s"
                print(said, file=sys.stderr)
    return score_table(rows, singles, skipped, items)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--items", type=int, default=300, help="prompts a skill")
    scores = score_all(parser.parse_args().items)
    DOCUMENT.write_text(filled(DOCUMENT.read_text(encoding="utf-8"), "scores", scores), encoding="utf-8")
    print(scores)


if __name__ == "__main__":
    main()
