"""Model directories: which files are read, what is refused, and that paths never leave the directory."""

from __future__ import annotations

import json
import os
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from directories import opened, refused, save

from merge.checkpoint import open_checkpoint
from merge.checkpoint.side_files import SMALL, lacking_code
from merge.errors import CheckpointError
from merge.recipe.model import ModelRef


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A directory with config.json and no weights yet."""
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text('{"model_type": "llama"}')
    return folder


def add_index(folder: Path, weight_map: Any, name: str = "model.safetensors.index.json") -> None:
    (folder / name).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


# --- what is read ------------------------------------------------------------------------------------------------


def test_a_single_file(model: Path) -> None:
    save(model / "model.safetensors", "a", "b")
    found = opened(model)
    assert (found.path, found.revision, found.config) == (str(model), None, {"model_type": "llama"})
    assert list(found.tensors) == ["a", "b"]
    info = (model / "model.safetensors").stat()
    (file,) = found.files
    assert (file.path, file.size, file.mtime_ns) == (str(model / "model.safetensors"), info.st_size, info.st_mtime_ns)
    assert found.notes == ()


def test_paths_are_absolute(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(model / "model.safetensors", "a")
    monkeypatch.chdir(model.parent)
    assert opened("model").tensors["a"].file == str(model / "model.safetensors")


def test_shards_with_an_index(model: Path) -> None:
    save(model / "model-00001-of-00002.safetensors", "b")
    save(model / "model-00002-of-00002.safetensors", "a")
    save(model / "other.safetensors", "unused")
    add_index(model, {"a": "model-00002-of-00002.safetensors", "b": "model-00001-of-00002.safetensors"})
    found = opened(model)
    assert list(found.tensors) == ["b", "a"]  # the files' order
    assert [Path(file.path).name[:11] for file in found.files] == ["model-00001", "model-00002"]


def test_shards_without_an_index(model: Path) -> None:
    save(model / "model-00001-of-00002.safetensors", "a")
    assert "expected 2 shards, found 1 (shard 00002 is not there)" in refused(model)
    save(model / "model-00002-of-00002.safetensors", "b")
    found = opened(model)
    assert list(found.tensors) == ["a", "b"]
    assert "all 2 shards" in found.notes[0]


def test_the_only_safetensors_file_under_another_name(model: Path) -> None:
    save(model / "weights.safetensors", "a")
    assert list(opened(model).tensors) == ["a"]
    save(model / "more.safetensors", "b")
    assert "2 safetensors files (more.safetensors, weights.safetensors)" in refused(model)


def test_safetensors_come_before_pickles(model: Path) -> None:
    torch.save({"old": torch.ones(1)}, model / "pytorch_model.bin")
    assert list(opened(model).tensors) == ["old"]
    save(model / "model.safetensors", "new")
    assert list(opened(model).tensors) == ["new"]


def test_sharded_pickles(model: Path) -> None:
    torch.save({"a": torch.ones(1)}, model / "pytorch_model-00001-of-00002.bin")
    torch.save({"b": torch.ones(1)}, model / "pytorch_model-00002-of-00002.bin")
    names = {"a": "pytorch_model-00001-of-00002.bin", "b": "pytorch_model-00002-of-00002.bin"}
    add_index(model, names, "pytorch_model.bin.index.json")
    assert list(opened(model).tensors) == ["a", "b"]
    (model / "pytorch_model.bin.index.json").unlink()
    assert list(opened(model).tensors) == ["a", "b"]


def test_a_single_file_wins_over_an_index_and_that_is_said(model: Path) -> None:
    save(model / "model.safetensors", "a")
    add_index(model, {"b": "gone.safetensors"})
    assert "model.safetensors is read" in opened(model).notes[0]


# --- what is refused ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("names", "phrase"),
    [
        ((), "is empty"),
        (("config.json", "notes.txt"), "has no weights in it, only config.json, notes.txt"),
        (("adapter_config.json", "adapter_model.safetensors"), "is an adapter (adapter_config.json)"),
        (("config.json", "model-q4.gguf"), "GGUF weights (model-q4.gguf). Name the file itself: model-q4.gguf."),
        (("params.json", "consolidated.00.pth"), "own format (consolidated.00.pth). Convert"),
        (("config.json", "consolidated.safetensors"), "own format (consolidated.safetensors). Convert"),
        (("config.json", "tf_model.h5"), "no weights that can be read, only tf_model.h5"),
    ],
)
def test_a_directory_without_weights_says_what_it_is(tmp_path: Path, names: tuple[str, ...], phrase: str) -> None:
    for name in names:
        (tmp_path / name).touch()
    assert phrase in refused(tmp_path)


def test_what_is_not_a_directory(tmp_path: Path) -> None:
    assert "no such directory" in refused(tmp_path / "absent")
    assert "not a hub id, which is ORG/NAME" in refused("absent")
    (tmp_path / "file").touch()
    assert "is a file. Name the directory" in refused(tmp_path / "file")


def test_a_local_directory_has_no_revisions(model: Path) -> None:
    with pytest.raises(CheckpointError, match='Remove "@main"'):
        open_checkpoint(ModelRef("m@main", str(model), revision="main"))


def test_an_adapter_is_not_dropped_silently(model: Path) -> None:
    with pytest.raises(CheckpointError, match="Fold it first"):
        open_checkpoint(ModelRef("m+a", str(model), adapter=ModelRef("a", "a")))


@pytest.mark.parametrize(
    ("text", "phrase"),
    [(None, "no config.json"), ("[]", "expected a JSON object"), ("{", "not valid JSON"), ("\xff", "not valid JSON")],
)
def test_a_config_that_is_missing_or_damaged(model: Path, text: str | None, phrase: str) -> None:
    save(model / "model.safetensors", "a")
    (model / "config.json").unlink()
    if text is not None:
        (model / "config.json").write_bytes(text.encode("latin-1"))
    assert phrase in refused(model)


def test_an_index_that_names_a_missing_file(model: Path) -> None:
    add_index(model, {"a": "model-00001-of-00001.safetensors"})
    message = refused(model)
    assert "model.safetensors.index.json: names model-00001-of-00001.safetensors, which is not there" in message


@pytest.mark.parametrize("weight_map", [None, {}, [], {"a": 3}])
def test_an_index_that_is_damaged(model: Path, weight_map: Any) -> None:
    add_index(model, weight_map)
    assert "model.safetensors.index.json" in refused(model)


def test_an_index_with_a_tensor_twice(model: Path) -> None:
    (model / "model.safetensors.index.json").write_text('{"weight_map": {"a": "x", "a": "y"}}')
    assert '"a" is there twice' in refused(model)


def test_an_index_that_does_not_agree_with_its_shards(model: Path) -> None:
    one, two = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
    save(model / one, "a", "b")
    save(model / two, "c")
    add_index(model, {"a": one, "b": one, "c": two, "d": two})
    assert f"{two}: d: listed in model.safetensors.index.json but not in the file" in refused(model)
    add_index(model, {"a": one, "c": two})
    assert f"{one}: b: in the file but not listed" in refused(model)
    add_index(model, {"a": one, "b": two, "c": two})
    assert f"{one}: b: is in this file, but model.safetensors.index.json says {two}" in refused(model)
    save(model / two, "c", "b")
    assert "b: is in two files" in refused(model)


def test_several_sets_of_shards(model: Path) -> None:
    for name in ("a-00001-of-00001.safetensors", "b-00001-of-00001.safetensors"):
        save(model / name, "x")
    assert "several sets of shards" in refused(model)


# --- paths never leave the directory -----------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["../out.safetensors", "sub/../../out.safetensors", "..\\out.safetensors"])
def test_an_index_cannot_climb_out(model: Path, name: str) -> None:
    save(model.parent / "out.safetensors", "a")
    add_index(model, {"a": name})
    assert "climbs out of the directory" in refused(model)


@pytest.mark.parametrize("name", ["/etc/passwd", "C:\\x.safetensors", "\\\\host\\x", "", "a\0b"])
def test_an_index_cannot_name_an_absolute_path(model: Path, name: str) -> None:
    add_index(model, {"a": name})
    assert "not a path inside the directory" in refused(model)


@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
def test_a_link_cannot_lead_out(model: Path, name: str) -> None:
    save(model / "model.safetensors", "a")
    (model / name).rename(model.parent / "outside")
    (model / name).symlink_to(model.parent / "outside")
    message = refused(model)
    assert "is a symbolic link to" in message
    assert "outside the model's directory" in message


def test_a_link_in_a_folder_cannot_lead_out(model: Path) -> None:
    save(model.parent / "x.safetensors", "a")
    (model / "sub").symlink_to(model.parent)
    add_index(model, {"a": "sub/x.safetensors"})
    assert "is a symbolic link to" in refused(model)


@pytest.mark.parametrize("blobs", ["models--org--name/blobs", "blobs/ab"])
def test_links_into_a_hub_cache_are_followed(model: Path, blobs: str) -> None:
    """As huggingface_hub filled a local_dir until version 0.23: large files are links into the cache."""
    save(model / "model.safetensors", "a")
    cache = model.parent / "hub"
    (cache / "models--org--name").mkdir(parents=True)
    (cache / blobs).mkdir(parents=True, exist_ok=True)
    for name in ("model.safetensors", "config.json"):
        (model / name).rename(cache / blobs / f"etag-{name}")
        (model / name).symlink_to(cache / blobs / f"etag-{name}")
    assert list(opened(model).tensors) == ["a"]
    add_index(model, {"a": "../hub/blobs/etag"})
    (model / "model.safetensors").unlink()
    assert "climbs out of the directory" in refused(model)


def test_links_inside_the_directory_and_to_the_directory_are_fine(model: Path) -> None:
    save(model / "real.safetensors", "a")
    (model / "model.safetensors").symlink_to("real.safetensors")
    (model.parent / "alias").symlink_to(model)
    assert list(opened(model.parent / "alias").tensors) == ["a"]


def test_a_side_file_that_leads_out_is_an_error(model: Path) -> None:
    save(model / "model.safetensors", "a")
    (model.parent / "secret").write_text("{}")
    (model / "tokenizer.json").symlink_to(model.parent / "secret")
    with pytest.raises(CheckpointError, match="symbolic link"):
        opened(model).side_files()


def test_a_broken_link_is_said(model: Path) -> None:
    (model / "model.safetensors").symlink_to(model / "gone")
    assert "links to a file that is not there" in refused(model)


# --- side files --------------------------------------------------------------------------------------------------


def test_side_files_go_by_a_rule(model: Path) -> None:
    save(model / "model.safetensors", "a")
    for folder in ("chat_templates", "1_Pooling", "runs", "checkpoint-5", "onnx"):
        (model / folder).mkdir()
    kept = [
        *("tokenizer.json", "merges.txt", "chat_template.jinja", "chat_templates/a.jinja", "generation_config.json"),
        *("source.spm", "normalizer.json", "preprocessor_config.json", "sentence_bert_config.json", "LICENSE"),
        *("config_sentence_transformers.json", "modules.json", "1_Pooling/config.json", "something_new.json"),
    ]
    left = [
        *("modeling_custom.py", "chat_templates/evil.py", "README.md", "training_args.bin", "optimizer.pt", ".env"),
        *("trainer_state.json", "eval_results.json", "model.onnx", "tf_model.h5", "pic.png", "runs/x.json"),
        *("checkpoint-5/tokenizer.json", "onnx/config.json", "other.index.json", "mergekit_config.yml", "data.jsonl"),
    ]
    for name in (*kept, *left):
        (model / name).write_text("{}")
    (model / "modules.json").write_text('[{"idx": 0, "path": ""}, {"idx": 1, "path": "1_Pooling"}]')
    assert opened(model).side_files() == tuple(sorted(kept))


def test_code_goes_along_if_auto_map_names_it(model: Path) -> None:
    save(model / "model.safetensors", "a")
    auto_map = {"AutoConfig": "configuration_x.XConfig", "AutoModel": "modeling_x.X", "AutoModelForY": "org/r--m.Y"}
    (model / "config.json").write_text(json.dumps({"auto_map": auto_map}))
    (model / "tokenizer_config.json").write_text('{"auto_map": {"AutoTokenizer": ["tokenization_x.XTok", null]}}')
    code = {
        "modeling_x.py": "from .configuration_x import XConfig\n  from .attention import attend\n",
        "attention.py": "import torch\nfrom .gone import lost\n",
        "configuration_x.py": "",
        "tokenization_x.py": "",
        "convert_x.py": "",
        "m.py": "",
    }
    for name, text in code.items():
        (model / name).write_text(text)
    found = ("attention.py", "configuration_x.py", "modeling_x.py", "tokenization_x.py")
    assert opened(model).side_files() == (*found, "tokenizer_config.json")
    (model / "attention.py").unlink()
    assert lacking_code(str(model), ["attention.py", "convert_x.py", "m.py"]) == ("attention.py",)


def test_a_module_that_lies_outside_is_refused(model: Path) -> None:
    save(model / "model.safetensors", "a")
    (model.parent / "other").mkdir()
    (model / "modules.json").write_text('[{"path": "../other"}]')
    assert "climbs out of the directory" in refused(model)
    (model / "modules.json").write_text('{"path": "x"}')
    assert "expected a list of objects with path and type" in refused(model)


def test_what_is_too_large_for_a_side_file_is_said(model: Path) -> None:
    save(model / "model.safetensors", "a")
    with (model / "index.faiss").open("wb") as file:
        file.truncate(SMALL + 1)
    assert opened(model).side_files() == ()
    assert opened(model).notes == ("not copied, because larger than side files are: index.faiss",)


def test_opening_a_local_model_imports_nothing_heavy(model: Path) -> None:
    save(model / "model.safetensors", "a")
    torch.save({"a": torch.ones(1)}, model / "x.bin")
    code = (
        "import sys; from merge.checkpoint import open_checkpoint; from merge.recipe.model import ModelRef; "
        "from merge.checkpoint.pickle_file import read_pickle; from merge.checkpoint.reader import SourceReader; "
        f"open_checkpoint(ModelRef('m', {str(model)!r})); read_pickle({str(model / 'x.bin')!r}); "
        "print([name for name in ('torch', 'transformers', 'huggingface_hub', 'numba') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_seventy_billion_parameters_are_opened_quickly(model: Path) -> None:
    """723 tensors in 30 shards, without a byte of data on the disk."""
    import time

    weight_map = {}
    for shard in range(30):
        name = f"model-{shard + 1:05d}-of-00030.safetensors"
        header = {}
        for i in range(24):
            tensor = f"model.layers.{shard}.part.{i}.weight"
            header[tensor] = {"dtype": "BF16", "shape": [8192, 8192], "data_offsets": [i * 2**27, (i + 1) * 2**27]}
            weight_map[tensor] = name
        text = json.dumps(header).encode()
        (model / name).write_bytes(struct.pack("<Q", len(text)) + text)
        os.truncate(model / name, 8 + len(text) + 24 * 2**27)
    add_index(model, weight_map)
    begin = time.process_time()
    assert len(opened(model).tensors) == 720
    assert time.process_time() - begin < 1  # about 0.03 s of the processor's time, however busy it is
