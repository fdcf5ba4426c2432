"""Side files: the small files of a model that are copied into an output with its weights.

All small files beside the weights are taken except weights in any format, indexes, leftovers of training, data, and
descriptions of the repository. Folders are taken if they are known to belong to the model: chat templates, and the
modules that sentence-transformers lists in modules.json. Python files are taken if `auto_map` or a type in modules.json
names them, together with the files that they import.
"""

from __future__ import annotations

import fnmatch
import os
import re
from collections.abc import Iterator, Sequence

from merge.checkpoint.files import FINETUNE_RECORD, inside, read_json, read_json_value
from merge.errors import CheckpointError

SMALL = 64_000_000  # bytes; the largest tokenizer.json of a known model has 35 MB
MODULES = "modules.json"
TEMPLATE_FOLDERS = ("chat_templates", "additional_chat_templates")
WEIGHTS = (
    *(".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".onnx", ".onnx_data", ".gguf", ".ggml"),
    *(".pkl", ".pickle", ".joblib", ".ot", ".nemo", ".tflite", ".mlmodel", ".distcp", ".engine"),
)
_NEVER = (
    "*.index.json",
    # leftovers of training
    *("training_args.*", "trainer_state.json", "optimizer*", "scheduler*", "rng_state*", "*_results.*", "*.log"),
    *(FINETUNE_RECORD, "training_log.json"),
    *("*tfevents*", "latest", "global_step*", "events.out.*", "*.tmp", "*.incomplete", "*.lock", "*.pyc", "*.jsonl"),
    # data, archives, and images of the hub's page
    *("*.csv", "*.tsv", "*.parquet", "*.arrow", "*.zip", "*.tar", "*.gz", "*.7z", ".*", "README*"),
    *("*.png", "*.jpg", "*.jpeg", "*.gif", "*.webp", "*.svg", "*.pdf", "*.mp4", "*.wav", "*.mp3"),
    # files that the output writes itself, or that would be wrong there: other recipes, formats, quantisations
    *("config.json", "adapter_config.json", "params.json", "merge_recipe.yaml", "merge_manifest.json"),
    *("mergekit_config.y*ml", "mergekit_moe_config.y*ml", "quant*_config.json", "hf_quant_config.json", "recipe.yaml"),
)
_MODULE_FOLDER = re.compile(r"\d+_\w+")  # as sentence-transformers numbers them
_AUTO_MAPS = (
    *("config.json", "tokenizer_config.json", "processor_config.json"),
    *("preprocessor_config.json", "video_preprocessor_config.json"),
)
_BESIDE = re.compile(r"^\s*(?:from\s+\.(\w+)\s+import\b|import\s+\.(\w+)|from\s+\.\s+import\s+(\w+))", re.MULTILINE)


def is_weights(name: str) -> bool:
    return name.lower().endswith(WEIGHTS)


def is_side_file(name: str, modules: Sequence[str] = ()) -> bool:
    """Whether a file, by its name relative to the model's directory, is one; code and size aside.

    Args:
        modules: folders that modules.json lists.
    """
    folder, _, file = name.rpartition("/")
    if is_weights(file) or file.endswith(".py"):
        return False
    if folder in modules:
        return file == "config.json" or not _is_never(file)
    return folder in ("", *TEMPLATE_FOLDERS) and not _is_never(file)


def _is_never(file: str) -> bool:
    return any(fnmatch.fnmatchcase(file, pattern) for pattern in _NEVER)


def may_be_side_file(name: str) -> bool:
    """For files of the hub that are not here yet: also modules with their weights, and no code."""
    folder, _, file = name.rpartition("/")
    if _MODULE_FOLDER.fullmatch(folder):
        return is_side_file(name, [folder]) or file in ("model.safetensors", "pytorch_model.bin")
    return is_side_file(name)


def list_side_files(directory: str) -> tuple[str, ...]:
    """Names of the existing side files, relative to the directory, in order.

    Raises:
        CheckpointError: one of them is a link that leaves the directory, or modules.json is damaged.
    """
    modules = module_folders(directory)
    names = [
        name
        for folder in ("", *TEMPLATE_FOLDERS, *modules)
        for name in _files(directory, folder)
        if is_side_file(name, modules)
    ]
    return tuple(sorted([name for name in names if _size(directory, name) <= SMALL] + list(code_files(directory))))


def too_large(directory: str) -> tuple[str, ...]:
    """Files that would be side files if they were small."""
    return tuple(name for name in _files(directory, "") if is_side_file(name) and _size(directory, name) > SMALL)


def module_folders(directory: str) -> tuple[str, ...]:
    """Folders that modules.json lists beside the transformer itself, in its order."""
    return tuple(
        path
        for entry in _modules(directory)
        if (path := entry.get("path")) and isinstance(path, str) and os.path.isdir(inside(directory, path))
    )


def code_files(directory: str) -> tuple[str, ...]:
    """Python files that run when the model is loaded with `trust_remote_code`, in order of their names."""
    return tuple(sorted(name for name, is_there in _code(directory).items() if is_there))


def lacking_code(directory: str, names: Sequence[str]) -> tuple[str, ...]:
    """The code files in a repository's list that are needed but not downloaded yet."""
    return tuple(sorted(name for name, is_there in _code(directory).items() if not is_there and name in names))


def _code(directory: str) -> dict[str, bool]:
    """Named Python files and those that they import; each with whether it exists."""
    found: dict[str, bool] = {}
    todo = list(_named_code(directory))
    while todo:
        name = todo.pop()
        if name in found:
            continue
        found[name] = os.path.isfile(inside(directory, name))
        if not found[name]:
            continue
        with open(inside(directory, name), encoding="utf-8", errors="replace") as file:
            text = file.read(SMALL)
        todo += [f"{module}.py" for match in _BESIDE.findall(text) for module in match if module]
    return found


def auto_map(path: str) -> dict[str, list[str]]:
    """Of a configuration file, the classes that `auto_map` names -> where their code is; a tokenizer has two places"""
    found = read_json(path, unique=False).get("auto_map") if os.path.isfile(path) else None
    named = {"AutoTokenizer": found} if isinstance(found, list) else found if isinstance(found, dict) else {}
    lists = {str(key): value if isinstance(value, list) else [value] for key, value in named.items()}
    return {key: [one for one in value if isinstance(one, str) and one] for key, value in lists.items()}


def code_of(directory: str, config: str) -> tuple[str, ...]:
    """The Python files that auto_map of one configuration file names."""
    classes = [one for places in auto_map(inside(directory, config)).values() for one in places]
    # "repository--module.Class" is code that lies elsewhere.
    return tuple(dict.fromkeys(f"{one.partition('.')[0]}.py" for one in classes if "--" not in one and "." in one))


def _named_code(directory: str) -> Iterator[str]:
    for config in _AUTO_MAPS:
        yield from code_of(directory, config)
    for entry in _modules(directory):
        kind = entry.get("type")
        if isinstance(kind, str) and not kind.startswith("sentence_transformers."):
            yield f"{kind.partition('.')[0]}.py"


def _modules(directory: str) -> list[dict[str, object]]:
    path = inside(directory, MODULES)
    if not os.path.isfile(path):
        return []
    listed = read_json_value(path, unique=False)
    if not isinstance(listed, list) or not all(isinstance(entry, dict) for entry in listed):
        raise CheckpointError(f"{path}: expected a list of objects with path and type. Download the file again.")
    return listed


def _files(directory: str, folder: str) -> list[str]:
    """Files of a folder, without dangling links."""
    if not os.path.isdir(place := os.path.join(directory, folder)):
        return []
    names = sorted(f"{folder}/{name}" if folder else name for name in os.listdir(place))
    return [name for name in names if not os.path.isdir(os.path.join(directory, name))]


def _size(directory: str, name: str) -> float:
    """Size in bytes; infinite for a dangling link."""
    path = inside(directory, name)
    return os.path.getsize(path) if os.path.isfile(path) else float("inf")
