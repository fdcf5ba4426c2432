"""The command line: exact lines, exit codes, and what is imported before anything is asked for."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import pytest

import merge.cli
from merge.cli import VERBS

Run = Callable[..., tuple[int, str, str]]
WRITTEN = [
    *("README.md", "config.json", "merge_manifest.json", "merge_recipe.yaml", "model.safetensors"),
    *("tokenizer.json", "tokenizer_config.json"),
]
TIES = """\
merge_method: ties
base_model: base
models:
  - model: math
    parameters: {weight: 0.5, density: 0.5}
  - model: code
    parameters: {weight: 0.5, density: 0.5}
dtype: bfloat16
"""


@pytest.fixture
def recipe(tmp_path: Path, make_model: Callable[..., Path]) -> Path:
    """A base, two fine-tunes of it, and tiny.yaml, which merges them."""
    make_model(tmp_path / "base", dtype="BF16")
    for seed, name in enumerate(("math", "code"), 1):
        make_model(tmp_path / name, base=tmp_path / "base", delta=0.01, seed=seed, dtype="BF16")
    path = tmp_path / "tiny.yaml"
    path.write_text(TIES, encoding="utf-8")
    return path


def test_help_lists_the_verbs(run_cli: Run) -> None:
    code, out, err = run_cli(["--help"])
    assert (code, err) == (0, "")
    assert out.splitlines()[0] == "Usage: merge [OPTIONS] COMMAND [ARGS]..."
    verbs = re.findall(r"^  ([a-z]+)  ", out.partition("Commands:")[2].partition("Examples:")[0], re.MULTILINE)
    assert verbs == list(VERBS)


def test_every_file_with_a_command_is_a_verb() -> None:
    folder = Path(merge.cli.__file__).parent
    assert {path.stem for path in folder.glob("*.py") if "\ndef command(" in path.read_text(encoding="utf-8")} == set(
        VERBS
    )


@pytest.mark.parametrize("verb", VERBS)
def test_each_verb_explains_itself_with_an_example(run_cli: Run, verb: str) -> None:
    code, out, err = run_cli([verb, "--help"])
    assert (code, err) == (0, "")
    assert out.startswith(f"Usage: merge {verb} ")
    assert f"  merge {verb}" in out


def test_no_verb_is_a_usage_error_that_shows_the_help(run_cli: Run) -> None:
    code, out, err = run_cli([])
    assert (code, out) == (2, "")
    assert "Commands:" in err


def test_version(run_cli: Run) -> None:
    assert run_cli(["--version"]) == (0, f"merge, version {version('merge-workbench')}\n", "")


def test_unknown_verb_names_the_nearest(run_cli: Run) -> None:
    code, out, err = run_cli(["veryfy", "somewhere"])
    assert (code, out) == (2, "")
    assert err.splitlines()[-1] == 'Error: no such command "veryfy"; did you mean "verify"?'


def test_unknown_option_is_a_usage_error(run_cli: Run) -> None:
    code, out, err = run_cli(["run", "x.yaml", "--thread", "2"])
    assert (code, out) == (2, "")
    assert "--threads" in err.splitlines()[-1]


def test_help_imports_nothing_heavy() -> None:
    heavy = ("torch", "numba", "numpy", "transformers", "safetensors", "huggingface_hub", "rich", "yaml")
    program = f"""
import sys
from merge.cli import main
sys.argv = ["merge", "--help"]
try:
    main()
except SystemExit as end:
    assert end.code == 0
print(*[name for name in {heavy!r} if name in sys.modules], file=sys.stderr)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stderr.split() == []


def test_methods_has_a_line_for_each(call_cli: Run) -> None:
    code, out, err = call_cli(["methods"])
    assert (code, err) == (0, "")
    names = [line.split()[0] for line in out.splitlines()[1:]]
    assert names == sorted(names)
    assert {"dare_linear", "dare_ties", "linear", "passthrough", "slerp", "task_arithmetic", "ties"} <= set(names)


def test_methods_explains_one(call_cli: Run) -> None:
    code, out, err = call_cli(["methods", "ties"])
    assert (code, err) == (0, "")
    lines = out.splitlines()
    assert lines[0] == "ties"
    assert "arXiv:2306.01708" in out
    (density,) = (line for line in lines if line.startswith("density "))
    assert density.split()[:7] == ["density", "each", "model", "float", "in", "[0,", "1]"]
    assert "merge_method: ties" in lines[lines.index("Example recipe:") :]
    assert any(line.startswith("Deviations: ") and line.endswith("in arbitrary order.") for line in lines)
    assert any(line.startswith("    y = b + lambda") for line in lines)


def test_methods_names_the_nearest(call_cli: Run) -> None:
    assert call_cli(["methods", "tise"]) == (2, "", 'merge: unknown method "tise"; did you mean "ties"?\n')


def test_methods_as_json(call_cli: Run) -> None:
    code, out, _ = call_cli(["methods", "--json"])
    methods = {method["name"]: method for method in json.loads(out)}
    assert code == 0
    assert [p["name"] for p in methods["ties"]["parameters"] if p["required"]] == ["weight"]
    code, out, _ = call_cli(["methods", "slerp", "--json"])
    assert code == 0
    assert [method["name"] for method in json.loads(out)] == ["slerp"]


def test_run_writes_a_whole_checkpoint_and_says_so(run_cli: Run, recipe: Path) -> None:
    code, out, err = run_cli(["run", "tiny.yaml"])
    assert (code, err) == (0, "")
    first, second = out.splitlines()
    assert first == f"{Path('merged/tiny')}: 21 tensors, 5,712 parameters, 13.5 kB"
    assert re.fullmatch(r"\d+\.\d s, [\d.]+ [kMG]?B/s read and written, peak memory \d+ MiB", second)
    merged = recipe.parent / "merged"
    assert [path.name for path in merged.iterdir()] == ["tiny"]
    assert sorted(path.name for path in (merged / "tiny").iterdir()) == WRITTEN
    assert (merged / "tiny" / "merge_recipe.yaml").read_text(encoding="utf-8") == TIES


def test_run_as_json(call_cli: Run, recipe: Path) -> None:
    code, out, err = call_cli(["run", "tiny.yaml", "-o", "elsewhere", "--json"])
    assert (code, err) == (0, "")
    report = json.loads(out)
    assert (report["out"], report["tensors"], report["resumed_tensors"]) == ("elsewhere", 21, 0)


def test_run_splits_at_the_shard_size(call_cli: Run, recipe: Path) -> None:
    code, _, err = call_cli(["run", "tiny.yaml", "-o", "out", "--shard-size", "4kB"])
    assert (code, err) == (0, "")
    files = sorted(path.name for path in (recipe.parent / "out").glob("model*"))
    assert files[0] == f"model-00001-of-{len(files) - 1:05d}.safetensors"
    assert files[-1] == "model.safetensors.index.json"


def test_run_does_not_replace_what_is_there_without_force(call_cli: Run, recipe: Path) -> None:
    precious = recipe.parent / "out" / "precious.txt"
    precious.parent.mkdir()
    precious.write_text("mine")
    code, out, err = call_cli(["run", "tiny.yaml", "-o", "out"])
    assert (code, out) == (2, "")
    assert err == "merge: out exists; nothing was changed. Choose another --out, or --force to replace it.\n"
    assert precious.read_text() == "mine"
    assert call_cli(["run", "tiny.yaml", "-o", "out", "--force"])[0] == 0
    assert sorted(path.name for path in (recipe.parent / "out").iterdir()) == WRITTEN


def test_a_bad_recipe_is_told_whole_with_its_lines(call_cli: Run, recipe: Path) -> None:
    bad = TIES.replace("dtype: bfloat16", "dtype: bflaot16").replace("density: 0.5}\ndtype", "denstiy: 0.5}\ndtype")
    recipe.write_text(bad, encoding="utf-8")
    code, out, err = call_cli(["run", "tiny.yaml"])
    assert (code, out) == (2, "")
    assert 'tiny.yaml:7: unknown key "denstiy"; did you mean "density"?' in err
    assert "tiny.yaml:8: " in err
    assert "bfloat16" in err
    assert not (recipe.parent / "merged").exists()


def test_a_recipe_that_is_not_there(call_cli: Run, recipe: Path) -> None:
    code, out, err = call_cli(["run", "tinny.yaml"])
    assert (code, out) == (2, "")
    assert err == 'merge: tinny.yaml: there is no such recipe file; did you mean "tiny.yaml"?\n'


def test_quiet_prints_no_notes(call_cli: Run, recipe: Path, make_model: Callable[..., Path]) -> None:
    make_model(recipe.parent / "tied", tied=True, dtype="BF16")
    recipe.write_text("merge_method: linear\nmodels: [{model: base}, {model: tied}]\nparameters: {weight: 1}\n")
    code, _, err = call_cli(["run", "tiny.yaml", "-o", "loud"])
    assert code == 0
    assert err.startswith("note: tied: ")
    code, out, err = call_cli(["run", "tiny.yaml", "-o", "quiet", "--quiet"])
    assert (code, err) == (0, "")
    assert len(out.splitlines()) == 2


def test_plan_shows_the_merge_and_writes_nothing(call_cli: Run, recipe: Path) -> None:
    before = sorted(recipe.parent.iterdir())
    code, out, err = call_cli(["plan", "tiny.yaml"])
    assert (code, err) == (0, "")
    assert out.splitlines()[0].startswith("tiny: ties")
    assert sorted(recipe.parent.iterdir()) == before
    code, out, _ = call_cli(["plan", "tiny.yaml", "--json"])
    assert code == 0
    assert json.loads(out)


@pytest.mark.parametrize(
    ("args", "exit_code", "where", "words"),
    [
        (["run", "typo.yaml"], 2, "typo.yaml:1", 'unknown method "tees"'),
        (["plan", "typo.yaml"], 2, "typo.yaml:1", 'unknown method "tees"'),
        (["verify", "nothing"], 1, None, "nothing is not a finished output"),
        (["diff", "nothing", "base"], 1, None, "nothing"),
        (["run", "tiny.yaml", "-o", ""], 2, None, "the path is empty"),
    ],
)
def test_failures_are_json_too(
    call_cli: Run, recipe: Path, args: list[str], exit_code: int, where: str | None, words: str
) -> None:
    (recipe.parent / "typo.yaml").write_text(TIES.replace("merge_method: ties", "merge_method: tees"))
    code, out, err = call_cli([*args, "--json"])
    (problem,) = json.loads(out)["problems"]
    assert (code, problem["where"]) == (exit_code, where)
    assert words in problem["message"]
    assert words in err


def test_verbs_take_paths_and_json_from_their_common_options() -> None:
    for file in Path(merge.cli.__file__).parent.glob("*.py"):
        text = file.read_text(encoding="utf-8")
        assert file.stem == "options" or not re.search(r'click\.Path\(|"--json"', text), file


@pytest.mark.parametrize("args", [["run", "tiny.yaml", "-o", ""], ["verify", ""], ["compare", "a", "b", "--html", ""]])
def test_an_empty_path_is_a_usage_error(call_cli: Run, recipe: Path, args: list[str]) -> None:
    before = sorted(recipe.parent.rglob("*"))
    code, out, err = call_cli(args)
    assert (code, out) == (2, "")
    assert "the path is empty" in err
    assert sorted(recipe.parent.rglob("*")) == before


@pytest.mark.parametrize(
    "args", [["plan", "tiny.yaml"], ["diff", "base", "math"], ["formats", "0.1"], ["memory", "7B"]]
)
def test_a_narrow_terminal_cuts_no_number(call_cli: Run, recipe: Path, args: list[str]) -> None:
    numbers = [
        re.findall(r"\d[\d.,e-]*\d%?|\d", call_cli(args, env={"COLUMNS": columns})[1]) for columns in ("400", "40")
    ]
    assert set(numbers[0]) <= set(numbers[1])
    assert "…" not in call_cli(args, env={"COLUMNS": "40"})[1]


def test_verify_passes_what_was_written(call_cli: Run, recipe: Path) -> None:
    assert call_cli(["run", "tiny.yaml", "-o", "out"])[0] == 0
    code, out, err = call_cli(["verify", "out"])
    assert (code, err) == (0, "")
    assert out == "out: 21 tensors and 5 files as written, 11.4 kB\n"


def test_verify_names_the_tensor_that_changed(call_cli: Run, recipe: Path) -> None:
    assert call_cli(["run", "tiny.yaml", "-o", "out"])[0] == 0
    weights = recipe.parent / "out" / "model.safetensors"
    data = bytearray(weights.read_bytes())
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    changed, (start, _) = max((name, part["data_offsets"]) for name, part in header.items() if name != "__metadata__")
    data[8 + int.from_bytes(data[:8], "little") + start] ^= 1
    weights.write_bytes(data)
    code, out, err = call_cli(["verify", "out"])
    assert code == 1
    (line,) = out.splitlines()
    assert line.startswith(f"{changed} in ")
    assert "its bytes changed" in line
    assert err == "merge: out differs from its manifest in 1 place.\n"


def test_verify_as_json(call_cli: Run, recipe: Path) -> None:
    assert call_cli(["run", "tiny.yaml", "-o", "out"])[0] == 0
    (recipe.parent / "out" / "config.json").write_text("{}")
    code, out, _ = call_cli(["verify", "out", "--json"])
    assert code == 1
    (problem,) = json.loads(out)["problems"]
    assert "config.json: changed since the merge" in problem


def test_verify_of_what_is_not_an_output(call_cli: Run, recipe: Path) -> None:
    code, out, err = call_cli(["verify", "base"])
    assert (code, out) == (1, "")
    assert err.endswith("base is not a finished output of merge run.\n")
