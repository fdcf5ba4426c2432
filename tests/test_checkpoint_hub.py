"""Models of the hub: found in its cache, downloaded by name, and what is said where neither works."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from directories import opened, refused, save

from merge.checkpoint import open_checkpoint
from merge.checkpoint.hub import wanted
from merge.errors import CheckpointError
from merge.recipe.model import ModelRef

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The hub's cache, offline, with org/name in it, laid out as huggingface_hub does."""
    from huggingface_hub import constants

    folder = tmp_path / "hub"
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(folder))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    repository = folder / "models--org--name"
    snapshot = repository / "snapshots" / COMMIT
    (repository / "blobs").mkdir(parents=True)
    (repository / "refs").mkdir()
    (folder / "blobs" / "ab").mkdir(parents=True)
    snapshot.mkdir(parents=True)
    (repository / "refs" / "main").write_text(COMMIT)
    (repository / "blobs" / "e1").write_text("{}")
    save(folder / "blobs" / "ab" / "abcd", "a")  # shared between models, as huggingface_hub 2 does
    (repository / "blobs" / "e2").symlink_to("../../blobs/ab/abcd")
    for name, blob in (("config.json", "e1"), ("model.safetensors", "e2")):
        (snapshot / name).symlink_to(f"../../blobs/{blob}")
    return folder


def test_a_hub_model_is_found_in_the_cache(cache: Path) -> None:
    for revision in (None, "main", COMMIT):
        found = open_checkpoint(ModelRef("org/name", "org/name", revision))
        assert list(found.tensors) == ["a"]
        assert found.revision == COMMIT
        assert Path(found.path).name == COMMIT


def test_a_snapshot_can_be_named_as_a_directory(cache: Path) -> None:
    assert list(opened(cache / "models--org--name" / "snapshots" / COMMIT).tensors) == ["a"]


def test_a_snapshot_cannot_lead_out_of_the_cache(cache: Path) -> None:
    snapshot = cache / "models--org--name" / "snapshots" / COMMIT
    (cache.parent / "outside").write_text("{}")
    (snapshot / "config.json").unlink()
    (snapshot / "config.json").symlink_to(cache.parent / "outside")
    assert "is a symbolic link to" in refused(snapshot)


def test_offline_and_not_in_the_cache_says_what_to_do(cache: Path) -> None:
    message = refused("org/other")
    assert "not a local directory" in message
    assert "HF_HUB_OFFLINE is set" in message
    assert "hf download org/other" in message


def test_a_partial_cache_is_not_used(cache: Path) -> None:
    (cache / "models--org--name" / "snapshots" / COMMIT / "model.safetensors").unlink()
    assert "not complete in the Hugging Face cache" in refused("org/name")


def hub_error(name: str) -> Exception:
    """An error of the hub's, without the HTTP response that its constructor wants."""
    from huggingface_hub import errors

    kind: type[Exception] = getattr(errors, name)
    return kind.__new__(kind)


@pytest.mark.parametrize(
    ("error", "phrase"),
    [
        ("GatedRepoError", "gated model"),
        ("RepositoryNotFoundError", "not found on the hub"),
        ("RevisionNotFoundError", "not the revision v9"),
        (None, "the download failed (ConnectionError: no route)"),
    ],
)
def test_online_failures_are_told_apart(
    cache: Path, monkeypatch: pytest.MonkeyPatch, error: str | None, phrase: str
) -> None:
    import huggingface_hub

    def fail(*_: Any, **__: Any) -> None:
        raise hub_error(error) if error else ConnectionError("no route")

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr("merge.checkpoint.hub.no_network", lambda: None)
    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", fail)
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(ModelRef("org/other@v9", "org/other", "v9"))
    assert phrase in str(caught.value)
    found = open_checkpoint(ModelRef("org/name", "org/name"))  # the cache is good enough, and that is said
    assert "the hub gave no answer" in found.notes[0]
    assert found.revision == COMMIT


def test_what_is_there_is_downloaded_by_name_and_known_by_its_commit(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import huggingface_hub
    from huggingface_hub.hf_api import ModelInfo

    asked = []

    def download(repository: str, **options: Any) -> str:
        asked.append((repository, options))
        return str(cache / "models--org--name" / "snapshots" / COMMIT)

    files = [{"rfilename": name} for name in ("config.json", "model.safetensors", "pytorch_model.bin", "evil.py")]
    info = ModelInfo(id="org/name", sha=COMMIT, siblings=files)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr("merge.checkpoint.hub.no_network", lambda: None)
    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", lambda *_, **__: info)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    found = open_checkpoint(ModelRef("org/name@main", "org/name", "main"))
    assert found.revision == COMMIT
    assert asked == [("org/name", {"revision": "main", "allow_patterns": ["config.json", "model.safetensors"]})]


def test_only_what_a_merge_needs_is_downloaded() -> None:
    names = ["README.md", "config.json", "tokenizer.json", "modeling_x.py", "onnx/model.onnx", "pytorch_model.bin"]
    assert wanted(names) == ["config.json", "tokenizer.json", "pytorch_model.bin"]
    shards = ["model-00001-of-00001.safetensors", "model.safetensors.index.json", "consolidated.safetensors"]
    assert wanted([*names, *shards]) == ["config.json", "tokenizer.json", *shards[:2]]
    assert wanted(["model.safetensors", "x/model.safetensors", "model.fp16.safetensors"]) == ["model.safetensors"]
