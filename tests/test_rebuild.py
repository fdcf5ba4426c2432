"""merge verify --rebuild: the same bytes where methods promise them, a stated bound elsewhere, sources that changed."""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from bad_inputs.room import LINEAR, TASK, Room, call, edit_header
from random_adapters import write_adapter
from safetensors.numpy import load_file, save_file

from merge.checkpoint.digest import stored_digest
from merge.checkpoint.reader import SourceReader
from merge.checkpoint.safetensors_file import read_header
from merge.dtypes import DTYPES
from merge.methods import all_methods
from merge.output.manifest import MANIFEST, sealed
from merge.plan import SourceFile
from merge.tools.rebuild import BOUND

ISO = TASK.replace("task_arithmetic", "iso_c")
Q, NORM = "model.layers.0.self_attn.q_proj.weight", "model.norm.weight"


@pytest.fixture
def room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Room:
    monkeypatch.chdir(tmp_path)
    return Room(tmp_path, contextlib.ExitStack())


def again(*options: str, out: str = "out") -> tuple[int, dict[str, Any]]:
    """Exit code and what is found; nothing may be left beside the output."""
    before = sorted(Path().iterdir())
    code, stdout, stderr = call(["verify", out, "--rebuild", "--json", *options])
    assert sorted(Path().iterdir()) == before
    assert stdout, stderr
    verdict = json.loads(stdout)
    assert verdict["problems"] == []
    return code, verdict["rebuild"]


def doctor(name: str, edit: Callable[[Any], object], out: str = "out") -> None:
    """Changes a tensor of the output and the manifest with it, as if another machine had written them.

    `edit` gets the tensor's numbers (n,), bfloat16 as bits.
    """
    path = Path(out) / "model.safetensors"
    ref = next(ref for ref in read_header(str(path))[0] if ref.name == name)
    data = np.frombuffer(path.read_bytes(), np.uint8).copy()
    edit(data[ref.offset : ref.offset + ref.nbytes].view(DTYPES[ref.dtype].numpy_name))
    path.write_bytes(data.tobytes())
    with SourceReader([SourceFile.now(path)]) as reader:
        digest = stored_digest(reader, ref)
    manifest = json.loads((Path(out) / MANIFEST).read_text())
    del manifest["digest"]
    manifest["tensors"][name]["digest"] = digest
    (Path(out) / MANIFEST).write_bytes(sealed(manifest))


def add(amount: float) -> Callable[[Any], object]:
    """To the first value, in units of the largest magnitude."""

    def edit(values: Any) -> None:
        values[0] += np.float32(amount * np.abs(values).max())

    return edit


def step(values: Any) -> None:
    """The largest to its neighbour further from zero."""
    bits = values.view(f"u{values.itemsize}")
    bits[(bits & (2 ** (8 * values.itemsize - 1) - 1)).argmax()] += 1


RECIPES = {
    "linear": LINEAR,
    "iso_c": ISO,
    "streamed": "name: mean\n" + LINEAR + "---\n" + TASK.replace("model: b", "model: mean"),
    "written": "name: sum\n" + ISO + "---\n" + LINEAR.replace("model: b", "model: sum"),
    "converted": "",
    "mixture": "base_model: a\ngate_mode: hidden\nexperts:\n"
    "- {source_model: a, positive_prompts: [w1 w2]}\n- {source_model: b, positive_prompts: [w3]}\n",
}


@pytest.mark.parametrize("kind", [kind for kind in RECIPES if kind != "mixture"])
def test_what_was_merged_is_merged_again_to_the_same_bytes(room: Room, kind: str) -> None:
    arguments = room.pair_and_recipe(RECIPES[kind])
    assert call(["convert", "a", "--dtype", "float16", "-o", "out"] if kind == "converted" else arguments)[0] == 0
    code, found = again()
    assert code == 0, found
    assert found["agrees"]
    assert found["equal"] == len(load_file("out/model.safetensors"))
    assert not any(found[key] for key in ("sources", "within", "outside", "other", "versions"))
    code, stdout, _ = call(["verify", "out", "--rebuild"])
    assert code == 0
    assert stdout.splitlines()[-1] == f"out: merged again: {found['equal']} tensors with the same bytes"


def test_a_mixture_is_merged_again(tmp_path: Path, make_model: Callable[..., Path], room: Room) -> None:
    make_model(tmp_path / "a", seed=1)
    make_model(tmp_path / "b", seed=2, base=tmp_path / "a", delta=0.01)
    assert call(room.recipe(RECIPES["mixture"]))[0] == 0
    router = "model.layers.0.block_sparse_moe.gate.weight"
    doctor(router, add(BOUND / 4))  # made by a model that was run, so it has no promise
    code, found = again()
    assert (code, [each["name"] for each in found["within"]]) == (0, [router])
    doctor(NORM, add(BOUND / 4))
    assert again()[1]["outside"][0]["name"] == NORM


def test_adapters_are_merged_again(tmp_path: Path, room: Room) -> None:
    for name, seed in (("a", 1), ("b", 2)):
        write_adapter(tmp_path / name, seed)
    models = "models: [{model: a, parameters: {weight: 1}}, {model: b, parameters: {weight: 1}}]\n"
    for method, bitwise in (("cat", True), ("svd\nparameters: {rank: 2}", False)):
        assert call([*room.recipe(f"merge_method: {method}\n{models}"), "--force"])[0] == 0
        code, found = again()
        assert (code, found["agrees"]) == (0, True)
        manifest = json.loads((Path("out") / MANIFEST).read_text())
        assert ("conditions" in manifest) is not bitwise


@pytest.mark.parametrize(
    ("recipe", "edit", "fits"),
    [
        (ISO, add(BOUND / 2), True),
        (ISO, step, True),
        (ISO, add(BOUND * 2), False),
        (ISO, lambda values: values.fill(np.nan), False),
        (LINEAR, step, False),
        (TASK, add(BOUND / 2), False),
    ],
    ids=["within", "one step", "outside", "nan", "bitwise, one step", "bitwise, within"],
)
def test_a_bound_holds_where_bytes_are_not_promised(
    room: Room, recipe: str, edit: Callable[[Any], object], fits: bool
) -> None:
    assert call(room.pair_and_recipe(recipe))[0] == 0
    doctor(Q, edit)
    code, found = again()
    assert code == (0 if fits else 1)
    assert [each["name"] for each in found["within" if fits else "outside"]] == [Q]
    assert not found["outside" if fits else "within"]
    code, stdout, stderr = call(["verify", "out", "--rebuild"])
    assert (Q in stdout) is not fits
    assert ("1 equal to rounding" if fits else "1 different") in stdout
    assert stderr == ("" if fits else "merge: out differs from what its recipe and sources produce now.\n")


def test_one_step_of_bfloat16_is_within_the_bound_and_two_are_not(room: Room) -> None:
    assert call(room.pair_and_recipe(ISO + "dtype: bfloat16\n"))[0] == 0
    for fits in (True, False):
        doctor(Q, step)
        code, found = again()
        assert code == (0 if fits else 1), found


def test_nothing_stays_after_a_stop_and_what_a_kill_left_is_used_up(
    room: Room, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert call(room.pair_and_recipe())[0] == 0
    before = sorted(Path().iterdir())
    left = Path(".out.rebuild")
    with monkeypatch.context() as patch:
        patch.setattr("merge.output.writer.OutputDirectory.finish", lambda *_: exec("raise KeyboardInterrupt"))
        assert call(["verify", "out", "--rebuild"])[0] != 0
        assert sorted(Path().iterdir()) == before
        patch.setattr("shutil.rmtree", lambda *_, **__: None)
        assert call(["verify", "out", "--rebuild"])[0] != 0
    assert (left / "rebuilt.partial").is_dir()
    code, _, stderr = call(["verify", "out", "--rebuild"])
    assert (code, sorted(Path().iterdir())) == (0, before), stderr
    left.mkdir()
    (left / "mine").touch()
    code, _, stderr = call(["verify", "out", "--rebuild"])
    assert (code, (left / "mine").is_file(), "Move it away" in stderr) == (1, True, True)


def test_a_source_with_other_numbers_is_reported_first(room: Room) -> None:
    assert call(room.pair_and_recipe())[0] == 0
    tensors = load_file("b/model.safetensors")
    tensors[Q][0, 0] += 1
    size = Path("b/model.safetensors").stat().st_size
    save_file(tensors, "b/model.safetensors", {"format": "pt"})
    assert Path("b/model.safetensors").stat().st_size == size
    code, found = again()
    assert code == 1
    assert found["sources"] == ["b: changed since the merge: its tensors have other numbers"]
    assert [each["name"] for each in found["outside"]] == [Q]
    lines = call(["verify", "out", "--rebuild"])[1].splitlines()
    assert lines[1] == found["sources"][0]


def test_files_of_another_size_are_reported_and_nothing_is_merged(room: Room, monkeypatch: pytest.MonkeyPatch) -> None:
    assert call(room.pair_and_recipe())[0] == 0
    edit_header(Path("b/model.safetensors"), lambda header: header.update(__metadata__={"format": "pt", "more": "x"}))
    monkeypatch.setattr("merge.tools.rebuild.run_pipeline", lambda *_, **__: pytest.fail("merged"))
    code, found = again()
    assert (code, found["equal"]) == (1, 0)
    assert found["sources"] == ["b: changed since the merge: model.safetensors (another size, new or missing)"]


def test_a_source_that_is_missing_is_named_with_what_to_do(room: Room) -> None:
    assert call(room.pair_and_recipe())[0] == 0
    shutil.rmtree("b")
    code, stdout, stderr = call(["verify", "out", "--rebuild"])
    assert code == 1
    assert "out cannot be merged again:\n" in stderr
    assert 'there is no directory "b"' in stderr
    assert "--recipe-dir" in stderr
    assert "Traceback" not in stderr + stdout


def test_models_beside_the_recipe_are_found(room: Room, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    arguments = room.pair_and_recipe()
    assert call(arguments)[0] == 0
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert call(["verify", "../out", "--rebuild"])[0] == 1
    assert again("--recipe-dir", "..", out="../out")[0] == 0


def test_statistics_that_changed_are_a_source(tmp_path: Path, room: Room) -> None:
    room.pair()
    for name, value in (("a", 1.0), ("b", 3.0)):
        tensors = load_file(f"{name}/model.safetensors")
        save_file({f"fisher.{key}": np.full_like(each, value) for key, each in tensors.items()}, f"{name}.safetensors")
    models = "".join(f"- {{model: {name}, statistics: {name}.safetensors}}\n" for name in "ab")
    assert call(room.recipe(f"merge_method: fisher\nmodels:\n{models}"))[0] == 0
    assert again()[0] == 0
    save_file({key: each * 2 for key, each in load_file("b.safetensors").items()}, "b.safetensors")
    code, found = again()
    assert code == 1
    assert [line.split(": ", 1)[1] for line in found["sources"]] == ["changed since the merge: it has other statistics"]


def test_outputs_without_a_recipe_and_damaged_ones_are_refused(room: Room) -> None:
    assert call(room.pair_and_recipe())[0] == 0
    assert call(["lora", "extract", "b", "--base", "a", "-o", "adapter", "--rank", "2"])[0] == 0
    code, _, stderr = call(["verify", "adapter", "--rebuild"])
    assert (code, "was not made from a recipe" in stderr) == (1, True)
    manifest = json.loads((Path("out") / MANIFEST).read_text())
    del manifest["digest"]
    manifest["recipe"] = f"# made by: merge transplant a b --method mean\n{manifest['recipe']}"
    (Path("out") / MANIFEST).write_bytes(sealed(manifest))
    code, _, stderr = call(["verify", "out", "--rebuild"])
    assert (code, "merge transplant a b --method mean" in stderr) == (1, True)
    with Path("out/config.json").open("a") as file:
        file.write("\n")
    code, _, stderr = call(["verify", "out", "--rebuild"])
    assert (code, "It was not merged again." in stderr) == (1, True)


@pytest.mark.parametrize("option", [["--recipe-dir", "x"], ["--max-ram", "1GiB"], ["--method-file", "m.py"]])
def test_options_of_rebuild_need_it(room: Room, option: list[str]) -> None:
    code, _, stderr = call(["verify", "out", *option])
    assert (code, option[0] in stderr) == (2, True)


def test_the_manifest_says_what_bytes_hang_on_where_they_do(room: Room, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MKL_CBWR", "AUTO")
    room.pair()
    for recipe, bitwise in ((LINEAR, True), (ISO, False)):
        assert call([*room.recipe(recipe), "--force"])[0] == 0
        conditions = json.loads((Path("out") / MANIFEST).read_text()).get("conditions")
        assert (conditions is None) is bitwise
    assert conditions["settings"]["MKL_CBWR"] == "AUTO"
    assert (conditions["device"], conditions["threads"]) == ("cpu", 1)
    assert all(conditions[key] for key in ("torch", "cpu", "cpu_capability", "blas"))


def test_every_method_says_what_it_promises(room: Room) -> None:
    told = {each["name"]: each["reproducible"] for each in json.loads(call(["methods", "--json"])[1])}
    assert told == {name: method.reproducible for name, method in all_methods().items()}
    bounded = {name for name, promise in told.items() if promise == "bounded"}
    assert bounded == {"iso_c", "iso_cts", "knots", "regmean", "svd", "tsv", "wudi"}
    assert "Reproducible: bounded" in call(["methods", "tsv"])[1]
