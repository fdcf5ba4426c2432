"""Files of training data: every format, columns, mixing by weights, and files that are wrong."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest
from tiny_llama import write_lines

from finetune.data import read_samples
from finetune.data.contents import (
    Sample,
    Text,
    TextPair,
)
from finetune.data.files import read_rows
from finetune.data.mix import hold_out, mix
from finetune.data.samples import make_samples
from finetune.keys import Config, DataSource
from merge.errors import RecipeError, UsageError

# ---- files and formats


def test_every_kind_of_file_gives_the_same_rows(tmp_path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    rows = [{"prompt": "a, b", "completion": "x\ny"}, {"prompt": "ü", "completion": '"'}]
    write_lines(tmp_path / "d.jsonl", rows)
    (tmp_path / "d.json").write_text(json.dumps(rows), encoding="utf-8")
    (tmp_path / "wrapped.json").write_text(json.dumps({"version": 1, "data": rows}), encoding="utf-8")
    with (tmp_path / "d.csv").open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, ["prompt", "completion"])
        writer.writeheader()
        writer.writerows(rows)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "d.parquet")
    for name in ("d.jsonl", "d.json", "wrapped.json", "d.csv", "d.parquet"):
        assert [row.columns for row in read_rows(tmp_path / name)] == rows, name
    assert [row.place for row in read_rows(tmp_path / "d.jsonl")] == [f"{tmp_path}/d.jsonl:1", f"{tmp_path}/d.jsonl:2"]


def test_templates_take_any_columns(tmp_path: Path) -> None:
    rows = read_rows(write_lines(tmp_path / "d.jsonl", [{"question": "1+1", "answer": 2}]))
    source = DataSource("d", prompt="Q: {question} {{x}}\nA: ", completion="{answer}")
    assert make_samples(rows, source, Config(), [])[0].content == TextPair("Q: 1+1 {x}\nA: ", "2")
    assert make_samples(rows, DataSource("d"), Config(text="{question}={answer}"), [])[0].content == Text("1+1=2")


# ---- mixing and holding out


def samples(count: int, prefix: str) -> list[Sample]:
    return [Sample(f"{prefix}:{i}", None, Text(f"{prefix}{i}")) for i in range(count)]


def test_weights_are_proportions_of_as_many_examples() -> None:
    mixed = mix([samples(90, "a"), samples(10, "b")], [1, 3], seed=1)
    assert [sum(s.place.startswith(name) for s in mixed) for name in "ab"] == [25, 75]
    assert {s.place for s in mixed if s.place[0] == "b"} == {f"b:{i}" for i in range(10)}  # whole rounds: all of them
    assert mixed == mix([samples(90, "a"), samples(10, "b")], [1, 3], seed=1)
    assert mixed != mix([samples(90, "a"), samples(10, "b")], [1, 3], seed=2)


def test_without_weights_every_example_is_used_once() -> None:
    assert mix([samples(3, "a"), samples(2, "b")], [None, None], seed=0) == [*samples(3, "a"), *samples(2, "b")]


def test_equal_examples_are_held_out_together() -> None:
    doubled = samples(50, "a") + samples(50, "a")
    train, held = hold_out(doubled, 0.2, seed=0)
    assert len(held) == 20
    assert not {s.content for s in train} & {s.content for s in held}


def test_tables_as_they_come_from_real_life(tmp_path: Path) -> None:
    path = tmp_path / "d.csv"
    long = "a" * 200_000
    path.write_bytes(f'\ufeffprompt,completion\r\n"say ""x"",\r\nor\u2028y",A\r\n\r\n{long},B\r\n'.encode())
    rows = read_rows(path)
    assert [row.columns["prompt"] for row in rows] == ['say "x",\nor\u2028y', long]
    assert [row.place for row in rows] == [f"{path}:3", f"{path}:5"]
    path.write_text("text,text\na,b\n", encoding="utf-8")
    with pytest.raises(UsageError, match=r'd\.csv:1: two columns are called "text"; rename one'):
        read_rows(path)


# ---- wrong data


def test_wrong_files_are_explained_all_at_once(tmp_path: Path) -> None:
    (tmp_path / "empty.jsonl").write_text("\n", encoding="utf-8")
    (tmp_path / "broken.jsonl").write_text('{"text": "a"}\n{"text": \n', encoding="utf-8")
    sources = tuple(DataSource(str(tmp_path / name)) for name in ("empty.jsonl", "broken.jsonl", "gone.jsonl"))
    with pytest.raises(RecipeError) as caught:
        read_samples(Config(model="m", data=sources), None)
    found = [str(problem) for problem in caught.value.problems]
    assert found[0] == f"data {tmp_path}/empty.jsonl: holds no examples; it is empty."
    assert found[1].startswith(f"data {tmp_path}/broken.jsonl:2: is not valid JSON (")
    assert found[2] == f"data {tmp_path}/gone.jsonl: there is no such file."
