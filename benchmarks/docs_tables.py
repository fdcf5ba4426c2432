"""Writes the tables of the documents that repeat what the code says: verbs, methods, keys, layouts, folders.

    python benchmarks/docs_tables.py [--check]

A table stands between <!-- name --> and <!-- /name --> in its file; TABLES lists them. A new method, verb, key, layout,
objective, adapter kind, suite or folder needs no edit of a page by hand; tests/test_readme.py compares the pages with
the code. Tables of measurements have commands of their own, which use `filled` too: method_scores.py,
architecture_contract.py.
"""

from __future__ import annotations

import argparse
import ast
import importlib
import re
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import fields
from pathlib import Path

from finetune.keys import KEYS, PROMPTS, SOURCE_KEYS, Config, ConfigKey
from merge.adapter_kinds import KINDS as ADAPTER_KINDS
from merge.cli import VERBS
from merge.methods import Method, all_methods
from merge.moe_layouts import all_layouts
from merge.needs import QUANTISED
from merge.recipe.keys import KEYS as RECIPE_KEYS
from merge.recipe.keys import LEVELS
from merge.recipe.model import ALLOW
from merge.schema.keys import Key
from merge.schema.names import one_of
from merge.tools.stored_formats import FORMATS as STORED_FORMATS
from merge.tools.transplant import METHODS as TRANSPLANT_METHODS

ROOT = Path(__file__).resolve().parent.parent
# Folders that hold no Python package, or several things.
OTHERS = {
    "recipes": "Runnable recipes, one idea each, and the quickstart family.",
    "tests": "The tests.",
    "benchmarks": "Speed, memory, accuracy, comparison with mergekit; the tables of the documents.",
    "docs": "A page for each part, measurements, and what was tried and dropped.",
}


def filled(text: str, marker: str, content: str) -> str:
    """`text` with everything between <!-- marker --> and <!-- /marker --> replaced by `content`."""
    begin, end = f"<!-- {marker} -->", f"<!-- /{marker} -->"
    head, _, rest = text.partition(begin)
    _, found, tail = rest.partition(end)
    if not found:
        raise SystemExit(f"no {begin} ... {end}")
    return f"{head}{begin}\n{content}\n{end}{tail}"


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    first, *others = (f"| {' | '.join(map(cell, line))} |" for line in (head, *rows))
    return "\n".join([first, "|---" * len(head) + "|", *others])


def verb_table() -> str:
    return table(("verb", "what it does"), [(f"`merge {name}`", text) for name, text in VERBS.items()])


def built_in() -> list[Method]:
    return [method for method in all_methods().values() if not method.origin]


def method_table() -> str:
    rows = []
    for method in built_in():
        low, high = method.n_models
        many = f"{low}" if low == high else f"{low} or more" if high is None else f"{low} to {high}"
        rows.append((f"`{method.name}`", title(method), many, method.base, method.reproducible))
    return table(("method", "what it does", "models", "base", "reproducible"), rows)


def deviation_list() -> str:
    """The part of each method's docstring after "Deviations:"."""
    lines = []
    for method in built_in():
        found = re.search(r"^Deviations: (.*?)(?=^[A-Z][\w ]*: |\Z)", module_text(method), re.MULTILINE | re.DOTALL)
        if found is None and "Deviations:" in module_text(method):
            raise SystemExit(f'{method.name}: "Deviations:" must begin a line of its docstring')
        text = " ".join(found[1].split()) if found else ""
        if text and not text.startswith("none"):
            lines.append(f"* **{method.name}**: {text}")
    return "\n".join(lines)


def title(method: Method) -> str:
    """`TIES: trim each ...` -> `trim each ...`, the first line of the method's file."""
    return after_name(module_text(method))


def after_name(text: str) -> str:
    return text.strip().splitlines()[0].partition(": ")[2].rstrip(".")


def module_text(method: Method) -> str:
    return (sys.modules[method.reference.__module__].__doc__ or "").strip()


def recipe_keys() -> str:
    rows = [(f"`{name}`", value(key), explained(key)) for name, key in RECIPE_KEYS["recipe"].items()]
    return table(("key", "value", "what it does"), rows)


def keys_in(levels: Sequence[str]) -> str:
    """The keys of several levels: one row for a key that levels share, and none in mixtures for those of any recipe."""
    found: dict[tuple[str, Key], list[str]] = {}
    for level in levels:
        for name, key in RECIPE_KEYS[level].items():
            if level not in MIXTURE_LEVELS or RECIPE_KEYS["recipe"].get(name) is not key:
                found.setdefault((name, key), []).append(re.sub('"(.*?)"', r"`\1`", LEVELS[level]))
    rows = [(f"`{name}`", ", ".join(where), value(key), explained(key)) for (name, key), where in found.items()]
    return table(("key", "in", "value", "what it does"), rows)


MIXTURE_LEVELS = ("mixture", "expert", "attention", "reinit")
PART_LEVELS = tuple(level for level in RECIPE_KEYS if level not in ("recipe", *MIXTURE_LEVELS))


def explained(key: Key) -> str:
    """The help, linked to the page that tells more."""
    if not key.help:
        raise SystemExit(f"a key of merge/recipe/keys.py has no help: {key}")
    return key.help + (f" [More]({key.page})" if key.page else "")


def value(key: Key) -> str:
    """The values of a key in words: its choices, or its kind and bounds."""
    return key.takes or ", ".join(f"`{choice}`" for choice in key.choices) or f"{KINDS[key.kind]} {key.span}".rstrip()


def allow_table() -> str:
    return table(("`allow`", "what it permits"), [(f"`{name}`", text) for name, text in ALLOW.items()])


def layout_table() -> str:
    rows = []
    for layout in all_layouts().values():
        expert = f"`{layout.block}.experts.N`: " + ", ".join(f"`{name}`" for name in layout.names)
        shared = f"`{layout.block}.{layout.shared}`" if layout.shared else ""
        router = f"`{layout.block}.gate`"
        loads = "with the code that the result contains" if layout.files else "yes"
        words = ", ".join(f"`{word}`" for word in layout.words)
        rows.append((layout.title, words, ", ".join(layout.families), router, expert, shared, loads))
    return table(
        ("layout", "`architecture`", "of", "router", "experts", "shared expert", "loads in transformers"), rows
    )


def adapter_kinds() -> str:
    """Name, formula and source from the first lines of each kind's file; PEFT's names come from the files' names."""
    rows = []
    for name, module in ADAPTER_KINDS.items():
        text = (importlib.import_module(module).__doc__ or "").strip()
        source = re.search(r"arXiv:[\d.]*\d|openreview[^)]*", text)
        formula = re.split(r"(?<!\.)\. (?=[A-Z])", after_name(text))[0]
        rows.append((text.partition(":")[0], f"`{name}`", source[0] if source else "", formula))
    return table(("kind", "`peft_type`", "paper", "the change of a matrix W"), rows)


def transplant_methods() -> str:
    return table(
        ("`--method`", "row of a new token"), [(f"`{name}`", text) for name, text in TRANSPLANT_METHODS.items()]
    )


def quantize_formats() -> str:
    rows = [
        (f"`{name}`", form.title, ", ".join(package for package in QUANTISED[form.method]), form.on_cpu)
        for name, form in STORED_FORMATS.items()
    ]
    return table(("`--to`", "stored as", "transformers loads it with", "on CPU, transformers"), rows)


def suite_table() -> str:
    from eval.tasks import SUITES, get_suite

    suites = [get_suite(name) for name in SUITES]
    hub = {True: "Hugging Face hub", False: "in the package"}
    rows = []
    for suite in suites:
        shots = ", ".join(f"`{task.name}` {task.num_fewshot or 0}" for task in suite.tasks)
        rows.append((f"`{suite.name}`", suite.summary, shots, hub[any(task.needs for task in suite.tasks)]))
    return table(("suite", "about", "tasks, with their shots", "data"), rows)


def training_table() -> str:
    from finetune.trainables import TRAINABLES

    rows = []
    for name, way in TRAINABLES.items():
        own = ", ".join(f"`{key}`" for key, facts in KEYS.items() if name in facts.only)
        fits = ["yes" if fact else "no" for fact in (way.checkpointing, name not in PROMPTS)]
        rows.append((f"`{name}`", way.what, own, *fits))
    return table(("`train:`", "what is trained", "its keys", "with checkpointing", "with packing"), rows)


def objective_table() -> str:
    from finetune.objectives import KINDS as SAMPLE_KINDS
    from finetune.objectives import OBJECTIVES

    rows = []
    for name, objective in OBJECTIVES.items():
        data = ", ".join(SAMPLE_KINDS[kind].name for kind in objective.takes)
        own = ", ".join(f"`{key}`" for key, facts in KEYS.items() if name in facts.objectives)
        rows.append((f"`{name}`", after_name(sys.modules[type(objective).__module__].__doc__ or ""), data, own))
    return table(("`objective:`", "what it does", "data", "its keys"), rows)


def format_table() -> str:
    from finetune.data.formats import FORMATS

    rows = []
    for name, form in FORMATS.items():
        needs = ", and ".join(one_of([f"`{column}`" for column in need.split("|")]) for need in form.needs)
        rows.append((f"`{name}`", needs, ", ".join(f"`{column}`" for column in form.may), form.about))
    return table(("`format:`", "columns", "also read", "what they hold"), rows)


def finetune_keys() -> str:
    """Every key of a config of `merge finetune`, a table for each group, and the keys of an entry of `data`."""
    defaults = {one.name: one.default for one in fields(Config)}
    groups: dict[str, list[tuple[str, ...]]] = {}
    for name, key in KEYS.items():
        groups.setdefault(key.group, []).append(key_row(name, key, defaults[name]))
    groups["An entry of `data`"] = [key_row(name, key, None) for name, key in SOURCE_KEYS.items()]
    head = ("key", "value", "default", "what it does", "for")
    return "\n\n".join(f"## {group}\n\n{table(head, rows)}" for group, rows in groups.items())


def key_row(name: str, key: ConfigKey, default: object) -> tuple[str, ...]:
    shown = "" if default in (None, (), "") else f"`{str(default).lower() if isinstance(default, bool) else default}`"
    of = ", ".join(f"`{one}`" for one in (*key.only, *key.objectives))
    return f"`{name}`", value(key), shown, key.help, of


KINDS = {
    "str": "string",
    "int": "integer",
    "float": "number",
    "bool": "true or false",
    "words": "list of strings",
    "table": "mapping of strings to numbers",
    "data": "file, or list of entries",
    "fraction|data": "share, file, or list of entries",
}


def folder_tree() -> str:
    """Packages with the first line of their docstring, and the other folders."""
    rows = [("merge/", first_line(ROOT / "merge"))]
    rows += [(f"  {path.name}/", first_line(path)) for path in packages(ROOT / "merge")]
    rows += [(f"{name}/", first_line(ROOT / name)) for name in ("finetune", "eval")]
    rows += [(f"{name}/", text) for name, text in OTHERS.items()]
    return "\n".join(["```text", *(f"{name:18}{text}" for name, text in rows), "```"])


def packages(place: Path) -> list[Path]:
    return sorted(path.parent for path in place.glob("*/__init__.py"))


def first_line(package: Path) -> str:
    text = ast.get_docstring(ast.parse((package / "__init__.py").read_text(encoding="utf-8")))
    if not text:
        raise SystemExit(f"{package}/__init__.py: a package needs a docstring whose first line says what it is for")
    return text.splitlines()[0]


def cell(text: str) -> str:
    return text.replace("|", r"\|")


TABLES: dict[str, dict[str, Callable[[], str]]] = {
    "README.md": {"verbs": verb_table},
    "docs/methods.md": {"methods": method_table, "deviations": deviation_list},
    "docs/recipes.md": {
        "keys": recipe_keys,
        "parts": lambda: keys_in(PART_LEVELS),
        "allow": allow_table,
    },
    "docs/mixtures.md": {"keys": lambda: keys_in(MIXTURE_LEVELS), "layouts": layout_table},
    "docs/adapters.md": {"kinds": adapter_kinds},
    "docs/vocabularies.md": {"transplant": transplant_methods},
    "docs/suites.md": {"suites": suite_table},
    "docs/tools.md": {"quantize": quantize_formats},
    "docs/finetune.md": {"train": training_table, "formats": format_table, "objectives": objective_table},
    "docs/finetune-keys.md": {"keys": finetune_keys},
    "docs/design.md": {"tree": folder_tree},
}


def with_tables(name: str, text: str) -> str:
    """The document `name`, whose text is `text`, with all its tables as the code has them now."""
    for marker, make in TABLES[name].items():
        text = filled(text, marker, make())
    return text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 if a document is out of date")
    asked = parser.parse_args()
    stale = []
    for name in TABLES:
        before = (ROOT / name).read_text(encoding="utf-8")
        after = with_tables(name, before)
        if after != before:
            stale.append(name)
            if not asked.check:
                (ROOT / name).write_text(after, encoding="utf-8")
    print("\n".join(stale) or "all tables are up to date")
    sys.exit(1 if asked.check and stale else 0)


if __name__ == "__main__":
    main()
