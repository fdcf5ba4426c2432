"""Writes the tables of the documents that repeat what the code says: verbs, methods, config keys, folders.

    python benchmarks/docs_tables.py [--check]

A table stands between <!-- name --> and <!-- /name --> in its file; TABLES lists them. A new method, verb, key or
folder needs no edit of a page by hand; tests/test_readme.py compares the pages with the code. Tables of measurements
have commands of their own, which use `filled` too: method_scores.py, architecture_contract.py.
"""

from __future__ import annotations

import argparse
import ast
import re
import sys
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path

from finetune.keys import KEYS, SOURCE_KEYS, Config, ConfigKey
from merge.cli import VERBS
from merge.methods import Method, all_methods

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


def verb_table() -> str:
    rows = [f"| `merge {name}` | {cell(text)} |" for name, text in VERBS.items()]
    return "\n".join(["| verb | what it does |", "|---|---|", *rows])


def built_in() -> list[Method]:
    return [method for method in all_methods().values() if not method.origin]


def method_table() -> str:
    lines = ["| method | what it does | models | base | reproducible |", "|---|---|---|---|---|"]
    for method in built_in():
        low, high = method.n_models
        many = f"{low}" if low == high else f"{low} or more" if high is None else f"{low} to {high}"
        lines.append(f"| `{method.name}` | {cell(title(method))} | {many} | {method.base} | {method.reproducible} |")
    return "\n".join(lines)


def deviation_list() -> str:
    """What each method's docstring says after "Deviations:"."""
    lines = []
    for method in built_in():
        found = re.search(r"^Deviations: (.*?)(?=^[A-Z][\w ]*: |\Z)", module_text(method), re.MULTILINE | re.DOTALL)
        text = " ".join(found[1].split()) if found else ""
        if text and not text.startswith("none"):
            lines.append(f"* **{method.name}**: {text}")
    return "\n".join(lines)


def title(method: Method) -> str:
    """`TIES: trim each ...` -> `trim each ...`, the first line of the method's file."""
    return module_text(method).splitlines()[0].partition(": ")[2].rstrip(".")


def module_text(method: Method) -> str:
    return (sys.modules[method.reference.__module__].__doc__ or "").strip()


def finetune_keys() -> str:
    """Every key of a config of `merge finetune`, a table for each group, and the keys of an entry of `data`."""
    defaults = {one.name: one.default for one in fields(Config)}
    groups: dict[str, list[str]] = {}
    for name, key in KEYS.items():
        groups.setdefault(key.group, []).append(key_row(name, key, defaults[name]))
    groups["An entry of `data`"] = [key_row(name, key, None) for name, key in SOURCE_KEYS.items()]
    head = "| key | value | default | what it does | for |\n|---|---|---|---|---|\n"
    return "\n\n".join(f"## {group}\n\n{head}" + "\n".join(rows) for group, rows in groups.items())


def key_row(name: str, key: ConfigKey, default: object) -> str:
    value = ", ".join(f"`{choice}`" for choice in key.choices) or f"{KINDS[key.kind]} {key.span}".rstrip()
    shown = "" if default in (None, (), "") else f"`{str(default).lower() if isinstance(default, bool) else default}`"
    of = ", ".join(f"`{one}`" for one in (*key.only, *key.objectives))
    return f"| `{name}` | {cell(value)} | {shown} | {cell(key.help)} | {of} |"


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
