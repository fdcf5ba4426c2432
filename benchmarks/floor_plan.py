"""Figures of the tree: how long its files are, and who imports whom.

    python benchmarks/floor_plan.py [--lists]

An import counts wherever it is written, in functions too. A room is a folder below merge/, or merge/'s own files; an
arrow back is a room that imports one above it in ROOMS. `--lists` names what is counted.
"""

from __future__ import annotations

import argparse
import ast
import statistics
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Set
from pathlib import Path

ROOT = Path(__file__).parents[1]
PACKAGES = ("merge", "finetune", "eval")
# From the ground up; a room may import those before it. `face` is what users import: merge/__init__.
ROOMS = (
    *("merge", "schema", "chat", "kernels", "methods", "moe_layouts", "gguf_layouts", "recipe", "adapter_kinds"),
    "sources",
    *("checkpoint", "loading", "architecture", "vocabulary", "adapters", "layerwise", "output", "statistics"),
    *("findings", "planning", "engine", "workers", "jobs", "tools", "show", "face", "finetune", "eval", "cli"),
)
FACE = ("merge",)
Graph = Mapping[str, Set[str]]


def modules() -> dict[str, Path]:
    """Every file, by its dotted name."""
    found = {}
    for package in PACKAGES:
        for path in sorted((ROOT / package).rglob("*.py")):
            parts = path.relative_to(ROOT).with_suffix("").parts
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def code_lines(text: str) -> int:
    """Lines that are not blank, without docstrings; comments count."""
    dropped: set[int] = set()
    for node in ast.walk(ast.parse(text)):
        match node:
            case (
                ast.Module(body=[ast.Expr(value=ast.Constant(value=str())) as first, *_])
                | ast.ClassDef(body=[ast.Expr(value=ast.Constant(value=str())) as first, *_])
                | ast.FunctionDef(body=[ast.Expr(value=ast.Constant(value=str())) as first, *_])
            ):
                dropped.update(range(first.lineno, (first.end_lineno or first.lineno) + 1))
    return sum(bool(line.strip()) and i not in dropped for i, line in enumerate(text.splitlines(), 1))


def imports(files: Mapping[str, Path], typing_too: bool = True) -> dict[str, set[str]]:
    """For each file those of this tree that it imports."""
    return {name: set(_imports(path, files, typing_too)) - {name} for name, path in files.items()}


def _imports(path: Path, files: Mapping[str, Path], typing_too: bool) -> Iterator[str]:
    skipped: set[ast.AST] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.If) and not typing_too and ast.unparse(node.test) == "TYPE_CHECKING":
            skipped.update(each for inner in node.body for each in ast.walk(inner))
        if node in skipped:
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in files)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                if inner in files or node.module in files:
                    yield inner if inner in files else node.module


def circles(graph: Graph) -> list[list[str]]:
    """Groups of files that import each other, directly or through others (strongly connected components)."""
    order: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    found: list[list[str]] = []

    def visit(node: str) -> None:
        order[node] = low[node] = len(order)
        stack.append(node)
        for other in sorted(graph[node]):
            if other not in order:
                visit(other)
                low[node] = min(low[node], low[other])
            elif other in stack:
                low[node] = min(low[node], order[other])
        if low[node] == order[node]:
            at = stack.index(node)
            if len(stack) - at > 1:
                found.append(sorted(stack[at:]))
            del stack[at:]

    for node in graph:
        if node not in order:
            visit(node)
    return found


def room(name: str) -> str:
    if name in FACE:
        return "face"
    if name == "merge.__main__":
        return "cli"
    first, *rest = name.split(".")
    return rest[0] if first == "merge" and rest and (ROOT / "merge" / rest[0]).is_dir() else first


def arrows_back(graph: Graph) -> list[str]:
    """`room -> room: files` for each pair of rooms where a lower one imports a higher one."""
    found: dict[tuple[str, str], list[str]] = defaultdict(list)
    for name, others in graph.items():
        for other in others:
            here, there = room(name), room(other)
            if here != there and ROOMS.index(there) > ROOMS.index(here):
                found[here, there].append(f"{name} -> {other}")
    return [f"{here} -> {there}: {', '.join(sorted(each))}" for (here, there), each in sorted(found.items())]


def used_twice(trees: Iterable[ast.AST]) -> list[str]:
    """Names that more than one class has."""
    classes = Counter(node.name for tree in trees for node in ast.walk(tree) if isinstance(node, ast.ClassDef))
    return sorted(name for name, count in classes.items() if count > 1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lists", action="store_true", help="name what is counted")
    files = modules()
    texts = {name: path.read_text(encoding="utf-8") for name, path in files.items()}
    trees = {name: ast.parse(text) for name, text in texts.items()}
    lengths = {name: len(text.splitlines()) for name, text in texts.items()}
    twice = used_twice(trees.values())
    any_uses = sum(
        isinstance(node, ast.Name) and node.id == "Any" for tree in trees.values() for node in ast.walk(tree)
    )
    graph = imports(files)
    at_run_time = circles(imports(files, typing_too=False))
    back = arrows_back(graph)
    longest = max(lengths, key=lambda name: lengths[name])
    knots = circles(graph)
    for what, value in (
        ("files", f"{len(files):,}"),
        ("lines without blanks and docstrings", f"{sum(map(code_lines, texts.values())):,}"),
        ("median and longest file", f"{statistics.median(lengths.values()):.0f}, {lengths[longest]} ({longest})"),
        ("import circles, lazy imports counted", f"{len(at_run_time)} of {sum(map(len, at_run_time))} files"),
        ("import circles, imports for types counted too", f"{len(knots)} of {sum(map(len, knots))} files"),
        ("arrows back between rooms", len(back)),
        ("class names used twice", len(twice)),
        ("uses of Any", f"{any_uses:,}"),
    ):
        print(f"{what:<48}{value}")
    if parser.parse_args().lists:
        print(
            "\ncircles", *map(", ".join, at_run_time), "\narrows back", *back, "\nclasses", ", ".join(twice), sep="\n"
        )


if __name__ == "__main__":
    main()
