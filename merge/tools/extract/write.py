"""The small files of an extracted adapter: PEFT's config, a model card, a manifest that `merge verify` checks."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path

import xxhash

from merge.checkpoint.digest import stored_digest
from merge.checkpoint.reader import SourceReader
from merge.checkpoint.safetensors_file import read_header
from merge.output.manifest import FORMAT, sealed
from merge.plan import SourceFile

WEIGHTS = "adapter_model.safetensors"
CONFIG = "adapter_config.json"


def config_text(
    *,
    base: str,
    revision: str | None,
    causal: bool,
    ranks: Mapping[str, int],
    parameters: Sequence[str],
    others: Sequence[str],
    modules_to_save: Sequence[str],
    biases: bool,
    fan_in_fan_out: bool,
) -> str:
    """adapter_config.json. Alpha is the rank everywhere, so that every scaling is 1.

    Args:
        ranks: of each module or parameter with factors.
        parameters: those that PEFT does not treat as a module's weight.
        others: modules of the base without factors, which target_modules must not match.
    """
    counts = Counter(ranks.values())
    usual = max(counts, key=lambda rank: (counts[rank], rank)) if counts else 1
    # PEFT takes the first key that matches the end of a module's name, so the longest comes first.
    pattern = {name: rank for name, rank in sorted(ranks.items(), key=lambda item: -len(item[0])) if rank != usual}
    return _json(
        {
            "peft_type": "LORA",
            "task_type": "CAUSAL_LM" if causal else None,
            "base_model_name_or_path": base,
            "revision": revision,
            "inference_mode": True,
            "r": usual,
            "lora_alpha": usual,
            "rank_pattern": pattern,
            "alpha_pattern": dict(pattern),
            "target_modules": short_names([name for name in ranks if name not in parameters], others),
            "target_parameters": list(parameters) or None,
            "modules_to_save": list(modules_to_save) or None,
            "bias": "lora_only" if biases else "none",
            "lora_dropout": 0.0,
            "fan_in_fan_out": fan_in_fan_out,
            "init_lora_weights": True,
            "use_rslora": False,
            "use_dora": False,
        }
    )


def short_names(targets: Sequence[str], others: Sequence[str]) -> list[str]:
    """Short names such as q_proj if they match no other module, else full names. PEFT compares ends of names."""
    taken = {name.rpartition(".")[2] for name in others}
    short = {name.rpartition(".")[2] for name in targets} - taken
    return list(dict.fromkeys(leaf if (leaf := name.rpartition(".")[2]) in short else name for name in targets))


def card_text(name: str, base: str, is_hub: bool, tuned: str, table: Sequence[str]) -> str:
    """README.md with the Hub's metadata."""
    head = ["---", "library_name: peft", *(["base_model: " + json.dumps(base)] if is_hub else [])]
    head += ["tags:", "- lora", "- merge-workbench", "---"]
    lines = [*head, "", f"# {name}", "", f"A LoRA adapter extracted with Merge Workbench: {tuned} minus {base}.", ""]
    return "\n".join([*lines, *table, ""])


def manifest_of(
    directory: Path, files: Mapping[str, bytes], settings: Mapping[str, object], results: Sequence[Mapping[str, object]]
) -> bytes:
    """merge_manifest.json: digests of all written files, the settings, and the error of each module."""
    path = directory / WEIGHTS
    refs, _ = read_header(str(path))
    info = path.stat()
    with SourceReader([SourceFile.now(path)]) as reader:
        tensors = {
            ref.name: {
                "file": WEIGHTS,
                "dtype": ref.dtype,
                "shape": list(ref.shape),
                "digest": stored_digest(reader, ref),
            }
            for ref in refs
        }
    with path.open("rb") as file:
        header = file.read(int.from_bytes(file.read(8), "little"))
    return sealed(
        {
            "format": FORMAT,
            "tool": {name: metadata.version(name) for name in ("merge-workbench", "numpy", "torch")},
            "extracted": dict(settings),
            "modules": list(results),
            "shards": {WEIGHTS: {"size": info.st_size, "header": xxhash.xxh3_128_hexdigest(header)}},
            "files": {name: xxhash.xxh3_128_hexdigest(data) for name, data in files.items()},
            "tensors": tensors,
        }
    )


def _json(value: object) -> str:
    return json.dumps(value, indent=2, ensure_ascii=False) + "\n"
