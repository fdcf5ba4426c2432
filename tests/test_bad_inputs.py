"""Every bad input gets one clear message and the right exit code, and leaves everything as it was."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from bad_inputs import CASES, Case, try_out
from bad_inputs.machine import NotPossibleError
from bad_inputs.models import ODD_NAMES
from bad_inputs.room import opened, read_parts

OUT = "out"


@pytest.mark.parametrize("name", CASES)
def test_bad_input(name: str, tmp_path: Path) -> None:
    case = CASES[name]
    try:
        outcome = try_out(case, tmp_path)
    except NotPossibleError as reason:
        pytest.skip(str(reason))
    said = outcome.stdout + outcome.stderr if case.on_stdout or case.code == 0 else outcome.stderr
    assert outcome.code == case.code, said
    missing = [words for words in case.words if words not in said]
    assert not missing, f"{missing} not in:\n{said}"
    assert "Traceback" not in said
    assert outcome.changed == ()
    assert not (tmp_path / "the-code-was-run").exists()
    if case.code:
        _is_one_message(case, outcome.stdout, outcome.stderr)
        results = [made for made in outcome.made if ".partial" not in made]
        assert results == [], "left behind"
        assert not (case.stops_early and outcome.made), "begun before it was found"


def _is_one_message(case: Case, stdout: str, stderr: str) -> None:
    assert case.on_stdout or stdout == ""
    if stderr.startswith("Usage: "):
        assert stderr.count("\nError: ") == 1
    elif not (case.on_stdout and stderr == ""):
        lines = stderr.splitlines()
        assert lines[0].startswith("merge: ")
        assert not any(line.startswith("merge: ") for line in lines[1:])
    assert stderr == "" or stderr.endswith("\n")


# One of each kind through a process of its own: exit status and streams as a shell sees them.
BY_PROCESS = ("truncated_shard", "misspelt_parameter", "nan_weights", "output_exists", "tampered_tensor", "no_threads")


@pytest.mark.parametrize("name", BY_PROCESS)
def test_bad_input_in_a_process(name: str, tmp_path: Path) -> None:
    case = CASES[name]
    with opened(case, tmp_path) as (_, arguments):
        command = [sys.executable, "-W", "error", "-m", "merge", *arguments]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == case.code
    assert all(words in done.stdout + done.stderr for words in case.words)
    assert "Traceback" not in done.stderr
    _is_one_message(case, done.stdout, done.stderr)


@pytest.mark.skipif(os.name == "nt", reason="needs a POSIX shell")
@pytest.mark.parametrize(("closed", "name", "code"), [(">&-", "both_tied", 0), ("2>&-", "nan_weights", 1)])
def test_a_closed_stream_is_no_trouble(closed: str, name: str, code: int, tmp_path: Path) -> None:
    with opened(CASES[name], tmp_path) as (_, arguments):
        command = f'exec "$0" -m merge "$@" {closed}'
        done = subprocess.run(["sh", "-c", command, sys.executable, *arguments], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (code, "")
    assert "Traceback" not in done.stderr


@pytest.mark.skipif(os.name == "nt", reason="needs a POSIX shell")
def test_more_files_than_the_soft_limit(tmp_path: Path) -> None:
    with opened(CASES["both_tied"], tmp_path) as (_, arguments):
        command = ["sh", "-c", 'ulimit -Sn 14 && exec "$0" -m merge "$@"', sys.executable, *arguments]
        done = subprocess.run([*command, "--shard-size", "200B"], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert len(list((tmp_path / OUT).glob("*.safetensors"))) > 14


def test_there_are_cases_enough() -> None:
    assert sum(case.code != 0 for case in CASES.values()) >= 45


# What the odd but good inputs must lead to, beyond exit code 0.


def test_odd_tensor_names_survive(tmp_path: Path) -> None:
    from safetensors import safe_open

    assert try_out(CASES["odd_names"], tmp_path).code == 0
    with safe_open(tmp_path / OUT / "model.safetensors", "np") as file:
        assert set(ODD_NAMES) < set(file.keys())
        assert all(np.array_equal(file.get_tensor(name), np.ones(3, np.float32)) for name in ODD_NAMES)


def test_empty_and_scalar_tensors_keep_their_shape(tmp_path: Path) -> None:
    for name, expected in (("no_elements", {"empty": [0, 4], "wide": [4, 0]}), ("single_numbers", {"temperature": []})):
        (tmp_path / name).mkdir()
        assert try_out(CASES[name], tmp_path / name).code == 0
        header, _ = read_parts(tmp_path / name / OUT / "model.safetensors")
        assert {tensor: header[tensor]["shape"] for tensor in expected} == expected


def test_a_tied_and_an_untied_model_give_an_untied_one(tmp_path: Path) -> None:
    assert try_out(CASES["tied_and_untied"], tmp_path).code == 0
    a, b, out = (_read(tmp_path / name) for name in ("a", "b", OUT))
    embedding, head = "model.embed_tokens.weight", "lm_head.weight"
    assert head not in b
    np.testing.assert_array_equal(out[head], (a[head] + b[embedding]) / 2)
    np.testing.assert_array_equal(out[embedding], (a[embedding] + b[embedding]) / 2)
    assert json.loads((tmp_path / OUT / "config.json").read_text())["tie_word_embeddings"] is False


def test_two_tied_models_give_a_tied_one(tmp_path: Path) -> None:
    assert try_out(CASES["both_tied"], tmp_path).code == 0
    assert "lm_head.weight" not in _read(tmp_path / OUT)
    assert json.loads((tmp_path / OUT / "config.json").read_text())["tie_word_embeddings"] is True


def test_what_was_allowed_is_counted_in_the_manifest(tmp_path: Path) -> None:
    for name, key, count in (("nan_weights_allowed", "nonfinite", 3), ("float16_overflow_allowed", "overflow", 3)):
        (tmp_path / name).mkdir()
        assert try_out(CASES[name], tmp_path / name).code == 0
        text = (tmp_path / name / OUT / "merge_manifest.json").read_text()
        manifest = json.loads(text, parse_constant=pytest.fail)  # NaN is not JSON
        assert sum(tensor.get(key, 0) for tensor in manifest["tensors"].values()) == count


def test_force_leaves_nothing_of_the_other_recipe(tmp_path: Path) -> None:
    assert try_out(CASES["work_of_another_recipe_forced"], tmp_path).code == 0
    assert [path.name for path in (tmp_path / OUT).glob("*.safetensors")] == ["model.safetensors"]
    assert not (tmp_path / f"{OUT}.partial").exists()


def test_after_the_disk_was_full_the_same_command_goes_on(tmp_path: Path) -> None:
    case = CASES["disk_fills_up_at_the_end"]
    from bad_inputs.room import call

    try:
        with opened(case, tmp_path) as (room, arguments):
            assert call(arguments)[0] == 1
            subprocess.run(["mount", "-o", "remount,size=1m", str(room.path / "disk")], check=True)
            code, out, err = call(arguments)
            assert (code, err) == (0, "")
            assert "21 of them taken from an earlier run" in out
            assert call(["verify", "disk/out"])[0] == 0
    except NotPossibleError as reason:
        pytest.skip(str(reason))


def _read(path: Path) -> dict[str, np.ndarray]:
    from safetensors.numpy import load_file

    return dict(load_file(os.fspath(path / "model.safetensors")))
