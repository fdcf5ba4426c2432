"""The documents are true: commands parse, code compiles, recipes parse, links resolve, tables are those of the code."""

from __future__ import annotations

import ast
import contextlib
import importlib
import re
import runpy
import shlex
from pathlib import Path

import pytest
from click.exceptions import Exit

from merge.cli import VERBS, cli
from merge.methods import all_methods
from merge.planning.load import parse_pipeline
from merge.recipe.keys import KEYS

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
GUIDE = "docs/methods.md"
DOCUMENTS = {
    path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8")
    for path in (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md")))
}
TABLES = runpy.run_path(str(ROOT / "benchmarks" / "docs_tables.py"))
MADE = ("build", "dist", "merged")  # folders that commands make here


def blocks(language: str) -> list[str]:
    return [
        block
        for text in DOCUMENTS.values()
        for block in re.findall(rf"^```{language}\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    ]


def commands() -> list[str]:
    """Every `merge ...` that a document shows, in a block or in a line of text."""
    in_blocks = [line for block in blocks("sh") for line in block.splitlines() if line.startswith("merge ")]
    in_blocks += re.findall(r"^ {4}(merge [a-z]+ [^|[\n]+)$", "\n".join(DOCUMENTS.values()), re.MULTILINE)
    in_text = re.findall(r"`(merge [a-z]+ [^`\n]+)`", "\n".join(DOCUMENTS.values()))
    return list(dict.fromkeys([*in_blocks, *in_text]))


@pytest.mark.parametrize("line", commands())
def test_commands_parse(line: str) -> None:
    _, *words = shlex.split(line, comments=True)
    with cli.make_context("merge", words) as context:
        name, command, rest = cli.resolve_command(context, words)
        with contextlib.suppress(Exit), command.make_context(name, rest, parent=context):  # --help ends with Exit
            pass


def test_there_are_commands_to_parse() -> None:
    assert len(commands()) >= 5
    assert blocks("yaml")


@pytest.mark.parametrize("code", blocks("python"))
def test_python_compiles_and_its_imports_resolve(code: str) -> None:
    tree = ast.parse(code)
    compile(tree, "README.md", "exec")
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            module = importlib.import_module(node.module or "")
            assert [name.name for name in node.names if not hasattr(module, name.name)] == []
        elif isinstance(node, ast.Import):
            for name in node.names:
                importlib.import_module(name.name)


@pytest.mark.parametrize("text", blocks("yaml"))
def test_recipes_parse(text: str) -> None:
    stages = parse_pipeline(text).stages
    assert all(stage.recipe.merge_method in all_methods() for stage in stages)


def test_tables_list_every_verb_and_method() -> None:
    assert re.findall(r"^\| `merge (\w+)` \|", README, re.MULTILINE) == list(VERBS)
    rows = re.findall(r"^\| `(\w+)` \|.*\| (\w+) \| \w+ \|$", DOCUMENTS[GUIDE], re.MULTILINE)
    assert rows == [(name, method.base) for name, method in all_methods().items()]


def test_the_readme_fits_three_screens() -> None:
    assert len(README.splitlines()) <= 150


def test_the_page_of_recipes_names_every_key() -> None:
    page = DOCUMENTS["docs/recipes.md"].partition("## Keys")[2].partition("\n## ")[0]
    assert [key for key in KEYS["recipe"] if f"`{key}`" not in page] == []


def test_links_lead_somewhere() -> None:
    links = [
        (name, link) for name, text in DOCUMENTS.items() for link in re.findall(r"\]\((?!http)([^)#]+)[^)]*\)", text)
    ]
    assert [(name, link) for name, link in links if not (ROOT / name).parent.joinpath(link).exists()] == []


@pytest.mark.parametrize("name", TABLES["TABLES"])
def test_tables_say_what_the_code_says(name: str) -> None:
    fresh = TABLES["with_tables"](name, DOCUMENTS[name])
    assert fresh == DOCUMENTS[name], "python benchmarks/docs_tables.py writes it again"


def test_every_method_has_a_score_or_a_reason() -> None:
    scores = DOCUMENTS[GUIDE].partition("<!-- scores -->")[2]
    assert [name for name in all_methods() if f"| `{name}` |" not in scores and f"{name} (it " not in scores] == []


def test_the_map_is_the_tree() -> None:
    entries = re.findall(r"^( *)([\w.]+)/ +\S", DOCUMENTS["docs/design.md"].partition("## The tree")[2], re.MULTILINE)
    assert sorted(name for indent, name in entries if not indent) == folders(ROOT)
    assert sorted(name for indent, name in entries if indent) == folders(ROOT / "merge")


def folders(place: Path) -> list[str]:
    """Folders with something in them that is not made by a command."""
    return sorted(
        folder.name
        for folder in place.iterdir()
        if folder.is_dir()
        and not folder.name.startswith((".", "__"))
        and not folder.name.endswith(".egg-info")
        and not (place == ROOT and folder.name in MADE)
        and any(file.is_file() and "__pycache__" not in file.parts for file in folder.rglob("*"))
    )


def test_only_the_command_line_imports_finetune_or_eval() -> None:
    wrong = [
        f"{path.relative_to(ROOT).as_posix()}:{node.lineno}: {name}"
        for path in sorted((ROOT / "merge").rglob("*.py"))
        if (ROOT / "merge" / "cli") not in path.parents
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        for name in imported(node)
        if name.split(".")[0] in ("finetune", "eval")
    ]
    assert wrong == []


def imported(node: ast.AST) -> list[str]:
    if isinstance(node, ast.Import):
        return [name.name for name in node.names]
    return [node.module] if isinstance(node, ast.ImportFrom) and node.module and not node.level else []
