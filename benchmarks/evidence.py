"""Measures the skills family, for docs/evidence.md.

    python benchmarks/evidence.py family|methods|counts|subtraction [--only ties,tsv] [--recipes A.yaml,B.yaml]

`make skills` makes the family. Merges are made in a temporary directory and removed; answers are remembered, so that a
command that is killed resumes, and the same command again takes seconds. `--only` measures these methods, `--recipes`
adds recipes of one's own (what `merge analyse` suggests, what `merge search` found) to the table of methods.
Scores are exact match on the report items; ± is the standard error of the mean over the skills. Gains, intervals and p
are those of `merge compare`: over the best parent, Holm's correction over the rows of the table.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from docs_tables import built_in, filled
from method_scores import suggested

from eval.compare import average, average_error, compare
from eval.harness import evaluate
from eval.memory import Memory, default_path
from eval.models import subjects
from eval.results import ModelScores, Results
from eval.settings import Settings
from eval.tasks import resolve
from merge.methods import Method, all_methods

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "recipes" / "skills"))

from data import SKILLS  # noqa: E402

DOCUMENT = ROOT / "docs" / "evidence.md"
TOGETHER = "simultaneous"
COUNTS = (2, 4, 6, 8)
FORGOTTEN, TAKEN_OUT = "kind", (0.25, 0.5, 1.0)  # a skill of made-up facts, and how much of its expert is subtracted
# What is compared as experts grow: the average and the sum without and with pruning and election, and singular vectors.
COUNTED = ("task_arithmetic", "ties", "dare_ties", "tsv")


@dataclass(frozen=True)
class Family:
    """The models of a directory that `make skills` made, and the recipes over them."""

    folder: Path
    recipes: Path  # a directory for generated recipes

    def model(self, name: str) -> str:
        base = str(self.folder / "base")
        return base if name == "base" else f"{base}+{self.folder / name}"

    def recipe(
        self, name: str, method: Method, experts: Sequence[str], parameters: dict[str, Any], own: Sequence[float] = ()
    ) -> str:
        """The path of a recipe that merges the experts into float32: a bfloat16 base would lose small changes.

        own: a weight for each expert.
        """
        written: dict[str, Any] = {"name": name, "merge_method": method.name}
        if method.base == "required":
            written["base_model"] = self.model("base")
        written["models"] = [{"model": self.model(expert)} for expert in experts]
        for model, weight in zip(written["models"], own, strict=False):
            model["parameters"] = {"weight": weight}
        written |= {"parameters": parameters} if parameters else {}
        path = self.recipes / f"{name}.yaml"
        path.write_text(yaml.safe_dump(written | {"dtype": "float32"}, sort_keys=False), encoding="utf-8")
        return str(path)

    def judged(self, texts: Sequence[str], skills: Sequence[str], ensembles: Sequence[Sequence[str]] = ()) -> Results:
        """The models and recipes on the report items of the skills."""
        tasks = resolve([str(self.folder / "data" / "report" / f"{skill}.jsonl") for skill in skills], None)
        members = [subjects(list(names)) for names in ensembles]
        with Memory(default_path()) as memory:
            return evaluate(
                subjects(list(texts)), tasks, Settings(batch_size=130), memory, ensembles=members, progress=said
            )


def said(model: str, task: str, done: int, total: int) -> None:
    if done == total:
        print(f"{model}, {task}: {total} items", file=sys.stderr, flush=True)


def settings(method: Method, n_models: int) -> Iterator[tuple[str, dict[str, Any]]]:
    """What a method is measured with: its defaults, with weights that average and, if that differs, weights of 1."""
    needed = {p.name: suggested(method, p.name) for p in method.parameters if p.required and p.name != "weight"}
    words = [f"{name} {value}" for name, value in needed.items()]
    if not any(p.name == "weight" and p.required for p in method.parameters):
        yield ", ".join(words) or "defaults", needed
        return
    yield ", ".join([f"weight 1/{n_models}", *words]), needed | {"weight": round(1 / n_models, 6)}
    if not any(p.name.startswith("normalize") and p.default for p in method.parameters):
        yield ", ".join(["weight 1", *words]), needed | {"weight": 1.0}


def file_name(method: Method, words: str) -> str:
    return f"{method.name}-{words}".replace("/", "of").replace(" ", "")


def mergeable(method: Method) -> bool:
    """Whether it merges the experts from their weights alone."""
    many = method.n_models[1]
    return (many is None or many >= len(SKILLS)) and method.inputs != "adapters" and method.statistics is None


def family_table(family: Family, asked: argparse.Namespace) -> str:
    experts = list(SKILLS)
    names = ["base", *experts, TOGETHER]
    results = family.judged([family.model(name) for name in names], experts, [[family.model(e) for e in experts]])
    lines = [f"| model | {' | '.join(SKILLS)} | mean |", f"|---|{'---:|' * (len(SKILLS) + 1)}"]
    return "\n".join(lines + [score_row(results, model, model.name.partition(" of ")[0]) for model in results.models])


def methods_table(family: Family, asked: argparse.Namespace) -> str:
    experts = list(SKILLS)
    rows = {}
    for method in built_in():
        if mergeable(method) and (not asked.only or method.name in asked.only):
            for words, parameters in settings(method, len(experts)):
                rows[f"{method.name}, {words}"] = family.recipe(file_name(method, words), method, experts, parameters)
    rows |= {Path(path).stem: path for path in asked.recipes}
    parents = ["base", *experts]
    texts = [*(family.model(name) for name in (*parents, TOGETHER)), *rows.values()]
    results = family.judged(texts, experts)
    base, *alone, together = results.models[: len(parents) + 1]
    merges = results.models[len(parents) + 1 :]
    compared = compare(results, [one.name for one in merges], [one.name for one in (base, *alone)])
    span = average(results, together) - average(results, base)
    lines = [
        f"| method | {' | '.join(SKILLS)} | mean | over the best parent | 95 % | p | share of the gain |",
        f"|---|{'---:|' * (len(SKILLS) + 5)}",
    ]
    found = sorted(zip(compared.merges, rows, strict=True), key=lambda pair: -average(results, pair[0].model))
    for merged, name in found:
        gain, share = merged.gains[-1], (average(results, merged.model) - average(results, base)) / span
        between = "" if gain.low is None or gain.high is None else f"{100 * gain.low:+.1f} to {100 * gain.high:+.1f}"
        p = "" if gain.p_adjusted is None else "< .001" if gain.p_adjusted < 0.001 else f"{gain.p_adjusted:.3f}"
        row = score_row(results, merged.model, name)
        lines.append(f"{row} {100 * gain.best.value:+.1f} | {between} | {p} | {100 * share:.0f} % |")
    best = max(alone, key=lambda one: average(results, one))
    lines += [score_row(results, one, f"*{one.name}*") + " | | | |" for one in (base, best, together)]
    return "\n".join(lines)


def counts_table(family: Family, asked: argparse.Namespace) -> str:
    """The mean over the skills of the experts that are merged, for their first 2, 4, 6 and 8."""
    everyone = list(SKILLS)
    sizes = [count for count in COUNTS if count <= len(everyone)]
    cells: dict[str, list[str]] = {}
    for count in sizes:
        experts = everyone[:count]
        rows = {}
        for method in built_in():
            if method.name in (asked.only or COUNTED):
                for words, parameters in settings(method, count):
                    kind = f"{method.name}, {'average' if words.startswith('weight 1/') else words}"
                    # The same recipe, under the same name, as in the table of methods: not merged a second time.
                    rows[kind] = family.recipe(file_name(method, words), method, experts, parameters)
        texts = [family.model("base"), *(family.model(expert) for expert in experts)]
        results = family.judged([*texts, *rows.values()], experts)
        own = [model.tasks[skill].value for skill, model in zip(experts, results.models[1:], strict=False)]
        best = max(results.models[1 : count + 1], key=lambda one: average(results, one))
        cells.setdefault("*base*", []).append(mean_cell(results, results.models[0]))
        cells.setdefault("*best single expert*", []).append(mean_cell(results, best))
        cells.setdefault("*each expert on its own skill*", []).append(f"{100 * sum(own) / count:.1f}")
        for kind, model in zip(rows, results.models[count + 1 :], strict=True):
            cells.setdefault(kind, []).append(mean_cell(results, model))
    lines = [f"| method | {' | '.join(f'{count} experts' for count in sizes)} |", f"|---|{'---:|' * len(sizes)}"]
    return "\n".join(lines + [f"| {name} | {' | '.join(row)} |" for name, row in cells.items()])


def subtraction_table(family: Family, asked: argparse.Namespace) -> str:
    """One skill taken out of the model that learnt all: its expert, which was trained apart, with a negative weight."""
    rows = {TOGETHER: family.model(TOGETHER)}
    for weight in TAKEN_OUT:
        name = f"{TOGETHER} - {weight} {FORGOTTEN}"
        rows[name] = family.recipe(
            name, all_methods()["task_arithmetic"], [TOGETHER, FORGOTTEN], {}, own=(1.0, -weight)
        )
    results = family.judged(list(rows.values()), list(SKILLS))
    lines = [f"| model | {' | '.join(SKILLS)} | mean of the others |", f"|---|{'---:|' * (len(SKILLS) + 1)}"]
    for name, model in zip(rows, results.models, strict=True):
        scores = {skill: 100 * model.tasks[skill].value for skill in SKILLS}
        rest = [value for skill, value in scores.items() if skill != FORGOTTEN]
        cells = " | ".join(f"{value:.1f}" for value in (*scores.values(), sum(rest) / len(rest)))
        lines.append(f"| {name} | {cells} |")
    return "\n".join(lines)


def score_row(results: Results, model: ModelScores, name: str) -> str:
    values = " | ".join(f"{100 * model.tasks[task].value:.1f}" for task in results.tasks)
    return f"| {name} | {values} | {mean_cell(results, model)} |"


def mean_cell(results: Results, model: ModelScores) -> str:
    return f"{100 * average(results, model):.1f} ± {100 * (average_error(results, model) or 0.0):.1f}"


TABLES = {"family": family_table, "methods": methods_table, "counts": counts_table, "subtraction": subtraction_table}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("table", choices=TABLES)
    parser.add_argument("--family", type=Path, default=ROOT / "merged" / "skills")
    parser.add_argument("--only", type=lambda text: text.split(","), default=[], help="methods, separated by commas")
    parser.add_argument("--recipes", type=lambda text: text.split(","), default=[], help="further rows of `methods`")
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        table = TABLES[asked.table](Family(asked.family.resolve(), Path(folder)), asked)
    DOCUMENT.write_text(filled(DOCUMENT.read_text(encoding="utf-8"), asked.table, table), encoding="utf-8")
    print(table)


if __name__ == "__main__":
    main()
