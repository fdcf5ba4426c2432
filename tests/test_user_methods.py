"""Methods that users write: the example of docs/methods.md, --method-file, and the entry-point group."""

from __future__ import annotations

import hashlib
import json
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from merge import build_plan, load_method_file, load_recipe, run_plan
from merge.errors import MergeError, UsageError
from merge.methods import all_methods, registry
from merge.plan import Plan

ROOT = Path(__file__).resolve().parent.parent
GUIDE = (ROOT / "docs" / "methods.md").read_text(encoding="utf-8")
Run = Callable[..., tuple[int, str, str]]
HALF = '''\
"""Half: the first model, halved."""
from merge import method


@method(inputs="models", locality="element", formula="y = x_1 / 2")
def half(models):
    return models[0] / 2
'''


def from_guide(name: str) -> str:
    (block,) = re.findall(rf"^```\w+ {re.escape(name)}\n(.*?)^```$", GUIDE, re.MULTILINE | re.DOTALL)
    return str(block)


@pytest.fixture(autouse=True)
def own_registry(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What a test registers is gone after it."""
    monkeypatch.setattr(registry, "_METHODS", all_methods())
    modules = set(sys.modules)
    yield
    for name in set(sys.modules) - modules:
        if name.startswith(("my_", "other_")):
            del sys.modules[name]


@pytest.fixture
def models(tmp_path: Path, make_model: Callable[..., Path]) -> Path:
    """base, math, code and law, and the guide's method and recipe."""
    make_model(tmp_path / "base")
    for seed, name in enumerate(("math", "code", "law"), 1):
        make_model(tmp_path / name, base=tmp_path / "base", delta=0.01, seed=seed)
    for name in ("my_method.py", "recipe.yaml"):
        (tmp_path / name).write_text(from_guide(name), encoding="utf-8")
    return tmp_path


def check_median(out: Path, models: Path) -> None:
    """share goes from 1 in the first layer to 0.5 in the second and last."""
    base, *others = (load_file(models / name / "model.safetensors") for name in ("base", "math", "code", "law"))
    merged = load_file(out / "model.safetensors")
    assert merged.keys() == base.keys()
    for name, start in base.items():
        if not name.startswith("model.layers."):
            continue
        change = np.sort([other[name] - start for other in others], axis=0)[1]
        share = 0.5 if name.startswith("model.layers.1.") else 1.0
        np.testing.assert_allclose(merged[name], start + share * change, rtol=0, atol=1e-7)


def test_the_guides_example_runs_and_is_right(run_cli: Run, models: Path) -> None:
    assert len(from_guide("my_method.py").splitlines()) <= 10
    code, _, err = run_cli(["run", "recipe.yaml", "--method-file", "my_method.py", "-o", "out"])
    assert (code, err) == (0, "")
    check_median(models / "out", models)
    manifest = json.loads((models / "out" / "merge_manifest.json").read_text(encoding="utf-8"))
    digest = hashlib.sha256((models / "my_method.py").read_bytes()).hexdigest()
    assert manifest["method_origin"] == f"my_method.py, sha256 {digest}"
    assert run_cli(["verify", "out"])[0] == 0
    assert not (models / "__pycache__").exists()


def test_the_verbs_know_the_file(run_cli: Run, models: Path) -> None:
    code, out, _ = run_cli(["plan", "recipe.yaml", "--method-file", "my_method.py"])
    assert code == 0
    assert out.startswith("recipe: median (my_method.py, sha256 ")
    code, out, _ = run_cli(["methods", "--method-file", "my_method.py"])
    assert code == 0
    (line,) = (line for line in out.splitlines() if line.startswith("median "))
    assert line.rstrip().endswith("Median: the median change of each entry, so that one outlier model changes nothing.")
    code, out, _ = run_cli(["methods", "median", "--method-file", "my_method.py"])
    assert code == 0
    assert "\nFrom: my_method.py, sha256 " in out
    assert re.search(r"^share +the merge +float in \[0, 1\] +1\.0 +how far to go from the base$", out, re.MULTILINE)
    code, out, err = run_cli(["run", "recipe.yaml"])
    assert (code, out) == (2, "")
    assert 'unknown method "median"' in err


def test_several_files_and_a_plan_that_survives_json(models: Path) -> None:
    (models / "my_half.py").write_text(HALF, encoding="utf-8")
    assert load_method_file(models / "my_half.py") == ("half",)
    assert load_method_file(models / "my_method.py") == ("median",)
    plan = build_plan(load_recipe(models / "recipe.yaml"))
    assert Plan.from_json(plan.to_json()) == plan
    run_plan(plan, models / "out", threads=2)
    check_median(models / "out", models)


def test_built_in_methods_have_no_origin(models: Path) -> None:
    assert [method.origin for method in all_methods().values() if method.origin] == []


def test_another_version_of_the_file_does_not_go_on_with_the_work(
    models: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    load_method_file(models / "my_method.py")
    before = build_plan(load_recipe(models / "recipe.yaml"))

    class Stopped(Exception):
        pass

    def stop(*arguments: object) -> None:
        raise Stopped

    with monkeypatch.context() as patch:
        patch.setattr("merge.output.writer.OutputDirectory.complete", stop)
        with pytest.raises(Stopped):
            run_plan(before, models / "out")
    (models / "my_method.py").write_text(from_guide("my_method.py") + "# changed\n", encoding="utf-8")
    load_method_file(models / "my_method.py")
    with pytest.raises(UsageError, match=r"unfinished work of another recipe"):
        run_plan(build_plan(load_recipe(models / "recipe.yaml")), models / "out")
    with pytest.raises(UsageError, match=r'method "median" of my_method.py, sha256 .*, and here it is my_method.py'):
        run_plan(before, models / "out")
    (models / "my_method.py").write_text(from_guide("my_method.py"), encoding="utf-8")
    load_method_file(models / "my_method.py")
    assert run_plan(before, models / "out").resumed_tensors > 0


def test_a_plan_whose_method_is_not_loaded(models: Path) -> None:
    load_method_file(models / "my_method.py")
    plan = build_plan(load_recipe(models / "recipe.yaml"))
    registry._METHODS.pop("median")
    with pytest.raises(UsageError, match="it is not known here"):
        run_plan(plan, models / "out")
    assert not (models / "out.partial").exists()


BAD_FILES = {
    "missing": (None, r"--method-file my_bad\.py: No such file or directory\."),
    "directory": ("", r"--method-file my_bad\.py: Is a directory\."),
    "syntax": ("x = 1\ndef f(:\n", r"--method-file: my_bad\.py:2: invalid syntax\."),
    "not text": ("x = '\0'\n", r"--method-file: my_bad\.py.*null bytes.*\."),
    "raises": ("\n1 / 0\n", r"--method-file: my_bad\.py:2: ZeroDivisionError: division by zero\."),
    "exits": ("import sys\nsys.exit(3)\n", r"--method-file: my_bad\.py:2: SystemExit: 3\."),
    "no method": ("x = 1\n", r"--method-file my_bad\.py: it registers no merge method\. .*docs/methods\.md.*"),
    "clash": (
        HALF.replace("def half", "def ties"),
        r'.*my_bad\.py: there is a method "ties" already \(merge\.methods\.ties, part of merge-workbench\); '
        r"my_bad\.py, sha256 \w+ must choose another name\.",
    ),
    "reserved": (HALF.replace("def half", "def copy"), r'.*my_bad\.py, sha256 \w+: "copy" is what plans call .*'),
    "no type": (
        HALF.replace("(models)", "(models, *, t)"),
        r'.*my_bad\.py:5: TypeError: parameter "t" needs a type: .*',
    ),
    "odd type": (HALF.replace("(models)", "(models, *, t: list)"), r".*TypeError: parameter \"t\" needs a type: .*"),
    "no star": (HALF.replace("(models)", "(models, t: float)"), r'.*TypeError: half must take one tensor, then "\*".*'),
}


@pytest.mark.parametrize("case", BAD_FILES)
def test_a_bad_file_is_a_usage_error(case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    text, message = BAD_FILES[case]
    if case == "directory":
        Path("my_bad.py").mkdir()
    elif text is not None:
        Path("my_bad.py").write_text(text, encoding="utf-8")
    before = all_methods()
    with pytest.raises(UsageError) as caught:
        load_method_file("my_bad.py")
    assert re.fullmatch(message, str(caught.value))
    assert all_methods() == before


def test_a_bad_file_is_one_line_and_exit_code_2(run_cli: Run, models: Path) -> None:
    for verb in (["run", "recipe.yaml"], ["plan", "recipe.yaml"], ["methods"]):
        code, out, err = run_cli([*verb, "--method-file", "nowhere.py"])
        assert (code, out, err) == (2, "", "merge: --method-file nowhere.py: No such file or directory.\n")


def test_two_files_with_one_name_clash(tmp_path: Path) -> None:
    for name in ("my_half.py", "other_half.py"):
        (tmp_path / name).write_text(HALF, encoding="utf-8")
    load_method_file(tmp_path / "my_half.py")
    with pytest.raises(UsageError, match=r'"half" already \(my_half_\w+, my_half\.py, sha256 \w+\); other_half\.py'):
        load_method_file(tmp_path / "other_half.py")


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("return models[0, :1]", r"half must return a tensor of shape \[.+\], not \[1.*\]\."),
        ("return 1.0", r"half must return a tensor of shape \[.+\], not float\."),
        ("return models[7]", r"half \(my_half\.py\) failed: .*my_half\.py:7: IndexError: .*\."),
    ],
)
def test_what_a_method_does_wrong_names_tensor_and_line(models: Path, body: str, message: str) -> None:
    (models / "my_half.py").write_text(HALF.replace("return models[0] / 2", body), encoding="utf-8")
    (models / "half.yaml").write_text("merge_method: half\nmodels: [{model: base}, {model: math}]\n", encoding="utf-8")
    load_method_file(models / "my_half.py")
    with pytest.raises(MergeError, match=rf"^[\w.]+: {message}$"):
        run_plan(build_plan(load_recipe(models / "half.yaml")), models / "out", threads=1)


# Installed packages


def install(site: Path, text: str, version: str = "1.2") -> None:
    """A package "my-methods" as pip leaves it: a module, and metadata with the entry point."""
    info = site / f"my_methods-{version}.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: my-methods\nVersion: {version}\n", encoding="utf-8")
    (info / "entry_points.txt").write_text("[merge.methods]\nmine = my_methods_module\n", encoding="utf-8")
    (site / "my_methods_module.py").write_text(text, encoding="utf-8")


def test_an_installed_package_brings_its_methods(run_cli: Run, models: Path, tmp_path: Path) -> None:
    install(tmp_path / "site", HALF)
    env = {"PYTHONPATH": str(tmp_path / "site")}
    (models / "half.yaml").write_text("merge_method: half\nmodels: [{model: math}]\n", encoding="utf-8")
    code, _, err = run_cli(["run", "half.yaml", "-o", "out"], env=env)
    assert (code, err) == (0, "")
    name = "model.layers.0.mlp.up_proj.weight"
    merged, math = (load_file(models / place / "model.safetensors")[name] for place in ("out", "math"))
    np.testing.assert_array_equal(merged, math / 2)
    manifest = json.loads((models / "out" / "merge_manifest.json").read_text(encoding="utf-8"))
    digest = hashlib.sha256(HALF.encode()).hexdigest()
    assert manifest["method_origin"] == f"my-methods 1.2 (my_methods_module), sha256 {digest}"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "import nowhere_at_all\n",
            "merge: my-methods 1.2: its merge methods (my_methods_module) cannot be imported: "
            "ModuleNotFoundError: No module named 'nowhere_at_all'. Update or uninstall that package.\n",
        ),
        (
            HALF.replace("def half", "def linear"),
            'merge: my-methods 1.2: there is a method "linear" already '
            "(merge.methods.linear, part of merge-workbench); "
            "my-methods 1.2 (my_methods_module), sha256 DIGEST must choose another name.\n",
        ),
    ],
)
def test_a_broken_package_is_one_message_that_names_it(run_cli: Run, tmp_path: Path, text: str, message: str) -> None:
    install(tmp_path / "site", text)
    env = {"PYTHONPATH": str(tmp_path / "site")}
    expected = message.replace("DIGEST", hashlib.sha256(text.encode()).hexdigest())
    assert run_cli(["methods"], env=env) == (1, "", expected)
    assert run_cli(["--help"], env=env)[0] == 0
