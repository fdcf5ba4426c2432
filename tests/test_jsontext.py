"""Foreign JSON is read within bounds, and foreign text is quoted short."""

from __future__ import annotations

import ast
import json
import re
import tracemalloc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from merge.errors import CheckpointError, Problem
from merge.jsontext import JSONTextError, parse_json
from merge.quoting import bounded, clipped, quoted, some


def test_what_is_json_is_read_as_python_reads_it() -> None:
    text = json.dumps({"a": [1, 2.5, None, True, "é", {"b": []}], "c": 10**299})
    assert parse_json(text) == parse_json(text.encode()) == json.loads(text)
    assert parse_json('{"a": 1, "a": 2}') == {"a": 2}


@pytest.mark.parametrize(
    ("text", "options", "message"),
    [
        ("{", {}, "is not valid JSON (Expecting property name"),
        (b"\xff", {}, "is not valid JSON ('utf-8' codec can't decode byte 0xff"),
        ("[" * 100_000, {}, "is not valid JSON (it nests without end)"),
        ("[" * 65 + "]" * 65, {}, "nests deeper than 64 levels"),
        ('{"a":' * 65 + "1" + "}" * 65, {}, "nests deeper than 64 levels"),
        ("9" * 301, {}, "holds a number of 301 digits; at most 300 are allowed"),
        ("-" + "9" * 5000, {}, "holds a number of 5,001 digits"),
        ('{"a": 1, "b": 2, "a": 3}', {"unique": True}, 'is not valid JSON (duplicate: the name "a" is there twice)'),
        ('["\\ud800"]', {"is_text": True}, "is not valid JSON ('utf-8' codec can't encode character"),
    ],
)
def test_what_is_not_json_has_a_reason(text: str | bytes, options: dict[str, Any], message: str) -> None:
    with pytest.raises(JSONTextError) as caught:
        parse_json(text, **options)
    assert str(caught.value).startswith(message)


def test_bounds_leave_room_for_what_is_allowed() -> None:
    assert parse_json("[" * 64 + "]" * 64)
    assert parse_json("9" * 300) == int("9" * 300)
    assert parse_json('["\\ud83d\\ude00"]', is_text=True) == ["\U0001f600"]


ITEMS = ("[]", "{}", '{"a":1}', '{"name-%d":1}', "[1]", "1.5", '"ab"', '"string %d"', '["a%d","b%d"]', "[[[[]]]]")


@pytest.mark.parametrize("item", ITEMS)
def test_memory_is_estimated_before_it_is_taken(item: str) -> None:
    """99 MB of [] took 2.5 to 4.4 GB."""
    text = f"[{','.join(item.replace('%d', str(i)) for i in range(20_000))}]"
    tracemalloc.start()
    try:
        with pytest.raises(JSONTextError) as caught:
            parse_json(text, max_memory=0)
        refused = tracemalloc.get_traced_memory()[1]
        parse_json(text)
        taken = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    found = re.match(r"holds so many values that they take about (\d+) MiB of memory; at most 0 MiB", str(caught.value))
    assert found
    assert refused < 100_000
    assert taken < 1.1 * (int(found[1]) + 1) * 2**20


def test_a_duplicate_among_very_many_names_is_found_in_linear_time() -> None:
    """Quadratic, these 200,000 names would take hours."""
    names = ",".join(f'"{i}":0' for i in range(200_000))
    with pytest.raises(JSONTextError, match=r'the name "199999" is there twice'):
        parse_json(f'{{{names},"199999":1}}', unique=True)


def test_values_are_quoted_as_python_writes_them() -> None:
    values = (None, True, 3, -2.5, "a'b", b"x", [], [1, "a"], (), (1,), (1, 2), {}, {"a": [1, {"b": 2}]})
    assert [quoted(value) for value in values] == [repr(value) for value in values]


def test_quoting_takes_no_time_and_little_room() -> None:
    nested: Any = ()
    for _ in range(45):
        nested = (nested, nested)  # 2^45 parts
    assert quoted(nested) == "((((...), (...)), ((...), (...))), (((...), (...)), ((...), (...))))"
    assert quoted([0] * 10**6) == "[0, 0, 0, 0, 0, 0, ...]"
    assert quoted({str(i): i for i in range(9)}) == "{'0': 0, '1': 1, '2': 2, '3': 3, '4': 4, '5': 5, ...}"
    assert quoted(1 << 40_000) == "a number of 40,001 bits"
    assert quoted("x" * 70_000) == repr("x" * 60) + "..."
    assert quoted(object()) == "<object>"
    assert len(quoted([["y" * 70_000] * 9] * 9)) == 103
    assert clipped("x" * 70_000) == "x" * 120 + "... (70,000 characters)"
    assert some(["x" * 70_000, "b", "c", "d"]) == "x" * 120 + "... (70,000 characters), b, c and 1 more"


def test_every_message_is_bounded() -> None:
    path = "/".join(["d" * 255] * 8)
    name = "x" * 70_000
    expected = f"/{path}: {'x' * 120}... (70,001 characters) is wrong"  # with the colon
    assert str(CheckpointError(f"/{path}: {name}: is wrong")) == expected
    assert str(Problem(f"{name} is wrong", name, name)).count("x") == 360
    assert len(bounded("a " * 50_000)) < 8_050
    assert bounded("short") == "short"


ROOT = Path(__file__).parent.parent
# Files that may call these: the bounded readers, and a plan's own text, which is as long as the model has tensors.
PARSERS = {
    "json.load": (),
    "json.loads": (
        *("merge/jsontext.py", "merge/plan.py"),
        "merge/architecture/table.py",  # the table of this package
        *("merge/chat/render.py", "merge/chat/worker.py"),  # the pipe between two of our processes
    ),
    "yaml.compose": ("merge/schema/document.py",),
    "yaml.compose_all": ("merge/schema/document.py",),
    "yaml.parse": ("merge/schema/document.py",),
    "yaml.load": (),
    "yaml.load_all": (),
    "yaml.safe_load": (),
    "yaml.safe_load_all": (),
    "pickle.load": (),
    "pickle.loads": (),
    "pickle.Unpickler": (),
    "torch.load": (),
    "ast.literal_eval": ("eval/tasks/core/code.py",),  # of the suite's own tests
}


def _nodes() -> Iterator[tuple[str, ast.AST]]:
    """(file, node) of all the code but the script that made the data of a suite."""
    for file in sorted(path for folder in ("merge", "finetune", "eval") for path in (ROOT / folder).rglob("*.py")):
        place = file.relative_to(ROOT).as_posix()
        if place != "eval/tasks/core/build.py":
            yield from ((place, node) for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))))


def test_nothing_else_parses_what_others_wrote() -> None:
    """json.loads(json.dumps(x)) and the like, of a program's own text, may stand anywhere."""
    found = []
    for place, node in _nodes():
        if isinstance(node, ast.Call) and not _is_own_text(node):
            name = ast.unparse(node.func)
            found += [f"{place}:{node.lineno}: {name}"] if place not in PARSERS.get(name, (place,)) else []
    assert found == []


def _is_own_text(call: ast.Call) -> bool:
    made = call.args[0] if call.args else None
    return isinstance(made, ast.Call) and ast.unparse(made.func).endswith(("json.dumps", ".to_json"))


# Numbers, names of Python's, one letter, a text that is digested: no value of a file in a message.
WRITTEN_OUT = {
    "merge/__init__.py": {"__name__", "name"},
    "merge/cli/formats.py": {"value"},
    "merge/quoting.py": {"value[:_STRING]"},
    "merge/schema/document.py": {"found.group()"},
    "merge/recipe/references.py": {"clipped(text)"},
    "finetune/data/mix.py": {"sample.content"},
    "eval/blends.py": {"weight"},
    "eval/card.py": {"task.value"},
}


def test_messages_quote_foreign_values_by_the_helper() -> None:
    """{value!r} has no bound, and takes for ever of a tuple that holds itself twice 45 times."""
    found = [
        f"{place}:{node.lineno}: {ast.unparse(node.value)}"
        for place, node in _nodes()
        if isinstance(node, ast.FormattedValue) and node.conversion in (ord("r"), ord("a"))
        if ast.unparse(node.value) not in WRITTEN_OUT.get(place, ())
    ]
    assert found == []
