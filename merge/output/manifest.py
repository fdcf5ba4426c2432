"""merge_manifest.json: the recipe, the sources and all digests. Equal runs give equal bytes.

Its last entry, "digest", is the SHA-256 of all lines before it, so that a change of the manifest is noticed too:
`head -n -2 merge_manifest.json | sha256sum`.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import msgspec
import xxhash

from merge.checkpoint.trust import code_that_ran
from merge.checkpoint.unchanged import check_unchanged
from merge.errors import OutputError, SourceChanged
from merge.jsontext import parse_json
from merge.plan import Plan, SourceFile
from merge.quoting import quoted

MANIFEST = "merge_manifest.json"
FORMAT = 2
_MOST_MEMORY = 1 << 30  # bytes of the parsed manifest: enough for 400,000 tensors


def side_file_bytes(plan: Plan) -> dict[str, bytes]:
    """Contents of the small output files, by name.

    Raises:
        SourceChanged: a file to copy is gone, or another one, since the plan was made.
    """
    try:
        return {
            side.name: _copied(side.source, side.state) if side.source is not None else _encoded(side.text or "")
            for side in plan.side_files
        }
    except OSError as error:
        raise SourceChanged(
            f"{error.filename}: cannot be read ({error.strerror}); it was there when the run was planned. Run again."
        ) from error


def _copied(source: str, state: SourceFile | None) -> bytes:
    data = Path(source).read_bytes()
    if state is not None:
        check_unchanged(state)
    return data


def manifest_bytes(
    plan: Plan,
    records: dict[int, dict[str, Any]],
    files: dict[str, bytes],
    aligned: Sequence[dict[str, Any]] = (),
    adapter: dict[str, Any] | None = None,
    conditions: dict[str, Any] | None = None,
) -> bytes:
    """The manifest's text. No times and no paths of this machine, so that equal runs give equal bytes.

    Args:
        records: the engine's record of each step: digests of output and sources, statistics.
        files: contents of the small files, by name.
        aligned: how many units were moved, by model and kind of module.
        adapter: share of the energy that an adapter's factors keep, if they were truncated.
        conditions: what the bytes depend on, if they are not the same on every machine.
    """
    tensors = {}
    for i, step in enumerate(plan.steps):
        record = {key: value for key, value in records[i].items() if key not in ("step", "sources")}
        tensors[step.name] = {
            "file": step.file,
            "dtype": step.dtype,
            "shape": list(step.shape),
            "method": step.method,
            **record,
        }
    manifest = {
        "format": FORMAT,
        "tool": {
            "merge-workbench": metadata.version("merge-workbench"),
            "numpy": metadata.version("numpy"),
            "numba": metadata.version("numba"),
        },
        **({"conditions": conditions} if conditions else {}),
        "name": plan.name,
        "method": plan.method,
        **({"method_origin": plan.method_origin} if plan.method_origin else {}),
        **({"other_origins": plan.other_origins} if plan.other_origins else {}),
        "seed": plan.seed,
        "allow": list(plan.allow),
        **({"compat": plan.compat} if plan.compat else {}),
        "notes": list(plan.notes),
        **({"trusted_code": code} if (code := code_that_ran()) else {}),
        "parameters": plan.n_parameters,
        "recipe": plan.recipe_text,
        "models": _models(plan, records),
        **({"stages": [_stage(stage) for stage in plan.stages]} if plan.stages else {}),
        **({"aligned": list(aligned)} if aligned else {}),
        **({"adapter": adapter} if adapter else {}),
        "shards": {
            shard.file: {"size": shard.size, "header": xxhash.xxh3_128_hexdigest(shard.header.encode())}
            for shard in plan.shards
        },
        "files": {name: xxhash.xxh3_128_hexdigest(data) for name, data in files.items()},
        "tensors": tensors,
    }
    return sealed(manifest)


def sealed(manifest: Mapping[str, Any]) -> bytes:
    """The bytes of a manifest's file: canonical JSON that ends with the digest of all before it."""
    text = _indented(manifest).removesuffix(b"\n}") + b",\n"
    return text + _end(text)


def _indented(manifest: Mapping[str, Any]) -> bytes:
    """json.dumps(manifest, indent=1), which itself takes several times as long: Python's C encoder knows no indent."""
    try:
        return msgspec.json.format(_encoded(json.dumps(manifest, ensure_ascii=False)), indent=1)
    except msgspec.DecodeError:  # half a surrogate pair, of a file name that is not text
        return _encoded(json.dumps(manifest, indent=1, ensure_ascii=False))


def is_sealed(data: bytes) -> bool:
    """Whether a manifest's file has the bytes that `sealed` gave it."""
    text = data[: -len(_end(b""))]
    return data == text + _end(text)


def _end(text: bytes) -> bytes:
    return f' "digest": "{hashlib.sha256(text).hexdigest()}"\n}}\n'.encode()


def _encoded(text: str) -> bytes:
    """Encodes as UTF-8; bytes of file names that are not text are escaped as Python and JSON do."""
    return text.encode("utf-8", "backslashreplace")


def _models(plan: Plan, records: dict[int, dict[str, Any]]) -> list[dict[str, Any]]:
    """Each input with one digest over the tensors read from it (names and digests, by name)."""
    seen: list[dict[str, str]] = [{} for _ in plan.models]
    for i, step in enumerate(plan.steps):
        owners = step.models if step.base is None else (step.base_model or 0, *step.models)
        for owner, source, digest in zip(owners, step.sources, records[i]["sources"], strict=True):
            seen[owner][source.name] = digest
    models = []
    for number, model in enumerate(plan.models):
        lines = "".join(f"{name}\0{digest}\n" for name, digest in sorted(seen[number].items()))
        models.append(
            {
                "model": model.ref,
                "revision": model.revision,
                "base": number == plan.base_model,
                "files": {Path(file.path).name: file.size for file in model.files},
                "tensors_read": len(seen[number]),
                "digest": hashlib.sha256(lines.encode()).hexdigest(),
            }
        )
    return models


def _stage(stage: Plan) -> dict[str, Any]:
    """The entry of an earlier stage of the pipeline: its sources. The recipe is part of the whole one."""
    return {
        "name": stage.name,
        "method": stage.method,
        **({"method_origin": stage.method_origin} if stage.method_origin else {}),
        "seed": stage.seed,
        "allow": list(stage.allow),
        **({"compat": stage.compat} if stage.compat else {}),
        "notes": list(stage.notes),
        "written": not stage.steps,
        "models": [
            {
                "model": model.ref,
                "revision": model.revision,
                "base": number == stage.base_model,
                "files": {Path(file.path).name: file.size for file in model.files},
            }
            for number, model in enumerate(stage.models)
        ],
    }


def read_manifest(directory: Path) -> dict[str, Any]:
    """The manifest of an output directory, checked for its shape."""
    path = directory / MANIFEST
    if not path.is_file():
        raise OutputError(f"{path} does not exist: {directory} is not a finished output of merge run.")
    try:
        manifest = parse_json(path.read_bytes(), max_memory=_MOST_MEMORY)
    except ValueError as error:
        raise OutputError(f"{path} {error}; the output was damaged.") from error
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        found = manifest.get("format") if isinstance(manifest, dict) else manifest
        raise OutputError(f"{path}: expected format {FORMAT}, found {quoted(found)}. Another version wrote it?")
    for key, fields in _FIELDS.items():
        entries = manifest.get(key)
        if not isinstance(entries, dict) or not all(_is_entry(key, *item, fields) for item in entries.items()):
            raise OutputError(f'{path}: "{key}" is not as merge run writes it; the output was damaged.')
    return manifest


# The fields that verify reads of each entry; "files" have a digest and no fields.
_FIELDS: dict[str, dict[str, type]] = {
    "shards": {"size": int, "header": str},
    "files": {},
    "tensors": {"digest": str, "file": str},
}


def _is_entry(key: str, name: str, entry: Any, fields: dict[str, type]) -> bool:
    is_outside = key != "tensors" and (Path(name).is_absolute() or ".." in Path(name).parts)
    if is_outside or not fields:
        return not is_outside and isinstance(entry, str)
    return isinstance(entry, dict) and all(isinstance(entry.get(field), kind) for field, kind in fields.items())
