"""What goes with the weights survives every verb: sentence-transformers' modules, processors, code; who gives them."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from conftest import write_json, write_safetensors
from safetensors.numpy import load_file

from merge.checkpoint.side_files import code_files
from merge.checkpoint.trust import code_of
from merge.cli import cli
from merge.engine.run import run_plan
from merge.errors import SourceChanged
from merge.jobs.build import build_plan
from merge.output.manifest import MANIFEST
from merge.output.verify import verify_output
from merge.planning.load import parse_recipe

LINEAR = "merge_method: linear\nmodels: [{model: ./a}, {model: ./b}]\nparameters: {weight: 1}\n"
SMALL = {
    "modules.json": '[{"idx": 0, "path": ""}, {"idx": 1, "path": "1_Pooling"}, {"idx": 2, "path": "2_Dense"}]',
    "1_Pooling/config.json": '{"pooling_mode_mean_tokens": true}',
    "2_Dense/config.json": '{"in_features": 16, "out_features": 4}',
    "config_sentence_transformers.json": '{"prompts": {}}',
    "preprocessor_config.json": '{"size": 4}',
    "source.spm": "pieces",
    "modeling_x.py": "from .parts import x\n",
    "parts.py": "x = 1\n",
}


@pytest.fixture
def models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, make_model: Callable[..., Path]) -> Path:
    """./a and ./b, each with a Dense module of its own and with code."""
    for seed, name in enumerate("ab", 1):
        path = make_model(tmp_path / name, seed=seed)
        for folder in ("1_Pooling", "2_Dense"):
            (path / folder).mkdir()
        for file, text in SMALL.items():
            (path / file).write_text(text)
        dense = np.full((4, 16), seed, np.float32)
        write_safetensors(path / "2_Dense" / "model.safetensors", {"linear.weight": (dense, "float32")})
        config = json.loads((path / "config.json").read_text())
        write_json(path / "config.json", {**config, "auto_map": {"AutoModel": "modeling_x.X"}})
    monkeypatch.chdir(tmp_path)
    return tmp_path


def assert_whole(out: Path, dense: float) -> None:
    for file, text in SMALL.items():
        assert (out / file).read_text() == text, file
    tensors = load_file(out / "2_Dense" / "model.safetensors")
    np.testing.assert_array_equal(tensors["linear.weight"], np.full((4, 16), dense, np.float32))
    assert list(tensors) == ["linear.weight"]
    manifest = json.loads((out / MANIFEST).read_bytes())
    assert set(SMALL) <= set(manifest["files"])
    assert "2_Dense/model.safetensors" in manifest["shards"]
    assert verify_output(out).problems == ()


def test_a_merge_keeps_them_and_merges_the_modules_weights(models: Path) -> None:
    (models / "r.yaml").write_text(LINEAR)
    done = CliRunner().invoke(cli, ["run", "r.yaml", "-o", "out", "--shard-size", "8kB"])
    assert done.exit_code == 0, done.output
    assert "note: copied with ./a: code that auto_map names (modeling_x.py, parts.py)" in done.stderr
    assert_whole(models / "out", 1.5)
    index = json.loads((models / "out" / "model.safetensors.index.json").read_text())
    assert "model.embed_tokens.weight" in index["weight_map"]
    assert not any("linear" in name for name in index["weight_map"])


@pytest.mark.parametrize(
    "arguments",
    [
        ["convert", "a"],
        ["transplant", "a", "b"],
        ["lora", "fold", "a", "lora"],
        ["quantize", "a", "--to", "int8", "--no-perplexity"],
    ],
    ids=lambda arguments: arguments[0],
)
def test_every_verb_that_writes_a_model_keeps_them(models: Path, arguments: list[str]) -> None:
    if "lora" in arguments:
        write_adapter(models / "lora")
    if "quantize" in arguments:
        config = json.loads((models / "a" / "config.json").read_text())
        del config["auto_map"]
        write_json(models / "a" / "config.json", config)
        (models / "a" / "tokenizer_config.json").write_text('{"auto_map": {"AutoTokenizer": "modeling_x.X"}}')
    done = CliRunner().invoke(cli, [*arguments, "-o", "out"])
    assert done.exit_code == 0, done.output
    assert_whole(models / "out", 1.0)


@pytest.mark.parametrize("named", [["slow.Slow", "fast.Fast"], {"AutoTokenizer": ["slow.Slow", "fast.Fast"]}])
def test_both_classes_of_a_tokenizer_name_their_code(tmp_path: Path, named: object) -> None:
    write_json(tmp_path / "tokenizer_config.json", {"auto_map": named})
    for name in ("slow.py", "fast.py", "other.py"):
        (tmp_path / name).write_text("")
    assert code_files(str(tmp_path)) == ("fast.py", "slow.py")
    assert code_of(str(tmp_path)) == {str(tmp_path / "tokenizer_config.json"): {"AutoTokenizer": "fast.Fast"}}


def write_adapter(path: Path) -> None:
    path.mkdir()
    write_json(
        path / "adapter_config.json", {"peft_type": "LORA", "r": 1, "lora_alpha": 1, "target_modules": ["q_proj"]}
    )
    module = "base_model.model.model.layers.0.self_attn.q_proj"
    factors = {"A": np.ones((1, 16), np.float32), "B": np.ones((16, 1), np.float32)}
    tensors = {f"{module}.lora_{letter}.weight": (data, "float32") for letter, data in factors.items()}
    write_safetensors(path / "adapter_model.safetensors", tensors)


def test_verify_sees_a_changed_module(models: Path) -> None:
    from merge.engine.run import run_plan

    run_plan(build_plan(parse_recipe(LINEAR, "r.yaml")), "out")
    (models / "out" / "1_Pooling" / "config.json").write_text("{}")
    shard = models / "out" / "2_Dense" / "model.safetensors"
    shard.write_bytes(shard.read_bytes()[:-1] + b"x")
    (models / "out" / "2_Dense" / "more.safetensors").write_bytes(b"")
    problems = " ".join(verify_output("out").problems)
    assert "1_Pooling/config.json: changed since the merge" in problems
    assert "2_Dense/linear.weight in out/2_Dense/model.safetensors: its bytes changed" in problems
    assert "2_Dense/more.safetensors: not part of this merge" in problems


def test_files_that_only_another_input_has_are_noted_and_chosen_by_config_donor(
    models: Path, make_model: Callable[..., Path]
) -> None:
    make_model(models / "plain", seed=3)
    text = LINEAR.replace("./a", "./plain") + "allow: [missing_tensors]\n"
    plan = build_plan(parse_recipe(text, "r.yaml"))
    assert not {"modules.json", "modeling_x.py"} & {side.name for side in plan.side_files}
    said = "not copied, as ./plain gives config.json and lacks them: 1_Pooling/config.json, 2_Dense/config.json, "
    assert any(note.startswith(said) and '("config_donor" chooses)' in note for note in plan.notes)
    plan = build_plan(parse_recipe(text + "config_donor: ./b\n", "r.yaml"))
    assert {"modules.json", "modeling_x.py"} <= {side.name for side in plan.side_files}
    assert plan.models[0].ref == "./b"


def test_a_side_file_that_is_another_than_when_the_run_was_planned(models: Path) -> None:
    plan = build_plan(parse_recipe(LINEAR))
    file = models / "a" / "tokenizer.json"
    before, new = file.stat(), file.with_name("new")
    new.write_bytes(file.read_bytes())
    os.utime(new, ns=(before.st_atime_ns, before.st_mtime_ns))
    os.replace(new, file)
    with pytest.raises(SourceChanged, match=r"a/tokenizer\.json: was replaced or written to since the run was planned"):
        run_plan(plan, "out")
    file.unlink()
    with pytest.raises(
        SourceChanged, match=r"a/tokenizer\.json: cannot be read .*it was there when the run was planned"
    ):
        run_plan(plan, "out")
    assert not list(models.glob("out*"))
