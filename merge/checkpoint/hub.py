"""A model as the recipe names it -> a directory: a local one, or a snapshot in huggingface_hub's cache."""

from __future__ import annotations

import contextlib
import fnmatch
import os
import re
from dataclasses import dataclass

from merge.checkpoint.files import read_json
from merge.checkpoint.network import OFFLINE, no_network
from merge.checkpoint.side_files import is_side_file, lacking_code, may_be_side_file
from merge.errors import CheckpointError
from merge.recipe.model import ModelRef
from merge.recipe.references import GGUF

_ADAPTER_WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")
# Files that a tokenizer may consist of; folders and weight indexes do not belong to it.
_TOKENIZER_FILES = [
    *("config.json", "tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab*", "merges.txt", "*.model"),
    *("*.spm", "*.tiktoken", "tekken.json", "normalizer.json", "chat_template*", "*chat_templates/*", "*_config.json"),
    "tokenization*.py",
]
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


@dataclass(frozen=True)
class ModelPlace:
    """An absolute path; the commit of a model from the hub; the file of the weights, if it lies elsewhere."""

    path: str
    revision: str | None = None
    notes: tuple[str, ...] = ()
    weights: str | None = None


def locate(ref: ModelRef, adapter: bool = False) -> ModelPlace:
    """The directory of a model or adapter; one from the hub is downloaded into the cache if it is missing there.

    Raises:
        CheckpointError: there is no such directory and no such model that can be reached.
    """
    path = os.path.expanduser(ref.path)
    if os.path.isdir(path):
        if ref.revision is not None:
            raise CheckpointError(
                f'{ref.text}: is a local directory, which has no revisions. Remove "@{ref.revision}".'
            )
        return ModelPlace(os.path.abspath(path))
    if path.endswith(GGUF) and os.path.isfile(path):
        from merge.checkpoint.gguf_view import view_of  # rarely needed

        return ModelPlace(view_of(os.path.abspath(path)), weights=os.path.abspath(path))
    if os.path.exists(path):
        config = "adapter_config.json" if adapter else "config.json"
        raise CheckpointError(f"{path}: is a file. Name the directory that holds {config} and the weights.")
    if not _HUB_ID.fullmatch(ref.path):
        raise CheckpointError(
            f"{ref.text}: no such directory (looked in {os.path.abspath(path)}), and not a hub id, which is ORG/NAME. "
            "Check the spelling."
        )
    return _from_hub(ref, adapter)


def locate_tokenizer(ref: ModelRef) -> str:
    """The directory of a model whose tokenizer is needed; from the hub only small files are downloaded.

    Raises:
        CheckpointError: there is no such directory and no such model that can be reached.
    """
    path = os.path.expanduser(ref.path)
    if os.path.isdir(path) or not _HUB_ID.fullmatch(ref.path):
        return locate(ref).path
    import huggingface_hub

    offline = no_network()
    try:
        found = huggingface_hub.snapshot_download(
            ref.path, revision=ref.revision, allow_patterns=_TOKENIZER_FILES, local_files_only=offline is not None
        )
    except Exception as error:  # as in _from_hub
        raise CheckpointError(f"{ref.text}: {_why(ref, error)}") from error
    return str(os.path.abspath(found))


def wanted(names: list[str], adapter: bool = False) -> list[str]:
    """The files to download from a model's repository: config, side files, modules, and one set of weights."""
    if adapter:
        files = [name for name in _ADAPTER_WEIGHTS if name in names][:1]
        return [name for name in names if name == "adapter_config.json" or is_side_file(name) or name in files]
    tops = [name for name in names if "/" not in name]
    weights: list[str] = []
    for single, kind in (("model.safetensors", ".safetensors"), ("pytorch_model.bin", ".bin")):
        files = [name for name in tops if name.endswith((kind, f"{kind}.index.json"))]
        stem = single.removesuffix(kind)
        named = [name for name in files if name.startswith(stem)]
        if files if kind == ".safetensors" else named:
            weights = [single] if single in files else named or files
            break
    small = {"config.json", "adapter_config.json"}
    return [name for name in names if name in small or may_be_side_file(name) or name in weights]


def _from_hub(ref: ModelRef, adapter: bool) -> ModelPlace:
    # Imported here because it takes much of a second, and most recipes name local directories.
    import huggingface_hub

    from merge.checkpoint.trust import trusted_names

    if offline := no_network():
        if cached := _cached(ref, adapter):
            return _from_cache(ref, cached, "" if offline == OFFLINE else offline)
        raise CheckpointError(
            f"{ref.text}: not a local directory, and {_not_cached(ref)} ({offline}). {_what_to_do(ref)}"
        )
    files: list[str] = []
    try:
        info = huggingface_hub.HfApi().model_info(ref.path, revision=ref.revision)
        names = [file.rfilename for file in info.siblings or ()]
        files = wanted(names, adapter)
        if not files:
            raise CheckpointError(f"{ref.text}: is on the hub, but holds no {'adapter' if adapter else 'model'}.")
        if ref.text in trusted_names() or ref.path in trusted_names():
            files += [name for name in names if name.endswith(".py") and "/" not in name]
        # By the name of the revision, not its commit, so that the cache finds it under that name again.
        path = os.path.abspath(huggingface_hub.snapshot_download(ref.path, revision=ref.revision, allow_patterns=files))
        while code := lacking_code(path, names):  # only what auto_map names, which is known now
            files += code
            huggingface_hub.snapshot_download(ref.path, revision=ref.revision, allow_patterns=files)
            if code == lacking_code(path, names):
                break
        return ModelPlace(path, os.path.basename(path))
    except CheckpointError:
        raise
    except Exception as error:  # the HTTP library below differs between versions, and so do its errors
        cached = _cached(ref, adapter)
        if cached is None:
            raise CheckpointError(f"{ref.text}: {_broke_off(ref, files, error) or _why(ref, error)}") from error
        return _from_cache(ref, cached, f"the hub gave no answer ({type(error).__name__})")


def _from_cache(ref: ModelRef, path: str, why: str) -> ModelPlace:
    """A snapshot of the cache. `why` the hub was not asked for a newer one; "" if the user wants that."""
    commit = os.path.basename(path)
    return ModelPlace(path, commit, (f"{why}; commit {commit} of the cache is used",) if why else ())


def _cached(ref: ModelRef, adapter: bool) -> str | None:
    """The model's directory in the cache, if its config and one set of weights are there."""
    import huggingface_hub

    config = "adapter_config.json" if adapter else "config.json"
    models = ("model.safetensors", "model*.safetensors", "*.safetensors", "pytorch_model*.bin")
    for pattern in _ADAPTER_WEIGHTS if adapter else models:
        try:
            path = huggingface_hub.snapshot_download(
                ref.path, revision=ref.revision, allow_patterns=[config, pattern], local_files_only=True
            )
        except (OSError, ValueError):  # LocalEntryNotFoundError is a FileNotFoundError
            continue
        names = os.listdir(path)
        whole = all(_has(path, name) for name in names)  # otherwise links to missing files
        if whole and config in names and fnmatch.filter(names, pattern):
            return str(os.path.abspath(path))
    return None


def _broke_off(ref: ModelRef, files: list[str], error: Exception) -> str:
    """The message if the hub listed the model's files and some were not downloaded; "" if it listed none."""
    import huggingface_hub

    lacking = [
        name
        for name in files
        if not isinstance(huggingface_hub.try_to_load_from_cache(ref.path, name, revision=ref.revision), str)
    ]
    if not lacking:
        return ""
    return (
        f"the download broke off ({_reason(error)}); not complete: {', '.join(lacking)}. Run the same command again: "
        "finished files stay in the Hugging Face cache."
    )


def _not_cached(ref: ModelRef) -> str:
    """What the cache holds: nothing of the model, or a snapshot with the names of its missing files."""
    from huggingface_hub import constants, file_download

    root = os.path.join(constants.HF_HUB_CACHE, file_download.repo_folder_name(repo_id=ref.path, repo_type="model"))
    commit = ref.revision or "main"
    with contextlib.suppress(OSError), open(os.path.join(root, "refs", commit), encoding="utf-8") as file:
        commit = file.read().strip()
    snapshot = os.path.join(root, "snapshots", commit)
    if not os.path.isdir(snapshot):
        return "not in the Hugging Face cache"
    # Links without their files remain after an interrupted download or in a cleaned cache.
    lacking = {name for name in os.listdir(snapshot) if not _has(snapshot, name)}
    for name in fnmatch.filter(os.listdir(snapshot), "*.index.json"):
        with contextlib.suppress(CheckpointError):
            shards = set(read_json(os.path.join(snapshot, name)).get("weight_map", {}).values())
            lacking |= {str(shard) for shard in shards if not _has(snapshot, str(shard))}
    if not lacking and not fnmatch.filter(os.listdir(snapshot), "*.safetensors"):
        lacking = {"its weights"}
    return f"not complete in the Hugging Face cache: {snapshot} lacks {', '.join(sorted(lacking)) or 'files'}"


def _has(folder: str, name: str) -> bool:
    return os.path.exists(os.path.join(folder, name))


def _reason(error: Exception) -> str:
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0]}" if text else type(error).__name__


def _why(ref: ModelRef, error: Exception) -> str:
    from huggingface_hub import errors

    version = "" if ref.revision is None else f" at revision {ref.revision}"
    if isinstance(error, errors.GatedRepoError):
        return (
            "is a gated model on the hub. Ask for access on the model's page, then sign in with `hf auth login` "
            "or set HF_TOKEN."
        )
    if isinstance(error, errors.RevisionNotFoundError):
        return f"the model is on the hub, but not the revision {ref.revision}. Name a branch, a tag or a full commit."
    if isinstance(error, errors.RepositoryNotFoundError):
        return (
            f"not a local directory, and not found on the hub{version}. Check the spelling; for a private model sign "
            "in with `hf auth login` or set HF_TOKEN."
        )
    return f"not a local directory, {_not_cached(ref)}, and the download failed ({_reason(error)}). " + _what_to_do(ref)


def _what_to_do(ref: ModelRef) -> str:
    revision = "" if ref.revision is None else f" --revision {ref.revision}"
    return f"Check the spelling, run `hf download {ref.path}{revision}` where there is a network, or name a directory."
