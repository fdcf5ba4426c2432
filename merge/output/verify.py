"""Compares an output directory with its manifest: every shard, header, tensor and small file."""

from __future__ import annotations

import concurrent.futures
import fnmatch
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import xxhash

from merge.checkpoint.digest import stored_digest
from merge.checkpoint.reader import SourceReader
from merge.checkpoint.safetensors_file import read_header
from merge.errors import CheckpointError
from merge.output.card import without_evaluation
from merge.output.manifest import MANIFEST, is_sealed, read_manifest
from merge.plan import SourceFile, TensorRef
from merge.processors import processors


@dataclass(frozen=True)
class Verdict:
    """`problems`: one sentence each; none means that the output is what was written."""

    tensors: int
    files: int
    bytes_checked: int
    problems: tuple[str, ...]


def verify_output(
    directory: str | os.PathLike[str],
    *,
    threads: int | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Verdict:
    """Reads an output once and compares it with its manifest.

    Args:
        threads: that read and hash; all processors by default.
        progress: called with bytes checked and bytes in all.

    Raises:
        OutputError: if there is no manifest to compare with.
    """
    root = Path(directory)
    manifest = read_manifest(root)
    problems = [*_itself(root), *_small_files(root, manifest), *_strangers(root, manifest)]
    refs: dict[str, TensorRef] = {}
    unread: dict[str, None] = {}
    for name, shard in manifest["shards"].items():
        before = len(refs)
        problems += _shard(root, name, shard, refs)
        unread |= {} if len(refs) > before else {name: None}
    problems += [
        f"{name}: in the manifest, but in no shard"
        for name, tensor in manifest["tensors"].items()
        if name not in refs and tensor["file"] not in unread  # problems of such a file are reported already
    ]
    good = {name: ref for name, ref in refs.items() if name in manifest["tensors"]}
    total = sum(ref.nbytes for ref in good.values())
    done = 0
    sources = [SourceFile.now(path) for path in dict.fromkeys(ref.file for ref in good.values())]
    with SourceReader(sources) as reader, concurrent.futures.ThreadPoolExecutor(threads or processors()) as pool:
        for name, digest in zip(good, pool.map(lambda ref: stored_digest(reader, ref), good.values()), strict=True):
            expected = manifest["tensors"][name]["digest"]
            if digest != expected:
                problems.append(
                    f"{name} in {good[name].file}: its bytes changed (digest {digest}, expected {expected})"
                )
            done += good[name].nbytes
            progress(done, total)
    return Verdict(len(good), len(manifest["files"]), total, tuple(problems))


def _shard(root: Path, name: str, expected: dict[str, object], refs: dict[str, TensorRef]) -> Iterator[str]:
    path = root / name
    if not path.is_file():
        yield f"{path}: missing"
        return
    if path.stat().st_size != expected["size"]:
        yield f"{path}: {path.stat().st_size:,} bytes, expected {expected['size']:,}"
        return
    try:
        found = read_header(str(path))[0]
    except CheckpointError as error:
        yield str(error)
        return
    with path.open("rb") as file:
        header = file.read(int.from_bytes(file.read(8), "little"))
    if xxhash.xxh3_128_hexdigest(header) != expected["header"]:
        yield f"{path}: its header changed"
    folder = name.rpartition("/")[0]  # tensors of a module in a folder of its own are called FOLDER/NAME
    refs.update((f"{folder}/{ref.name}" if folder else ref.name, ref) for ref in found)


def _itself(root: Path) -> Iterator[str]:
    if not is_sealed((root / MANIFEST).read_bytes()):
        yield f"{root / MANIFEST}: changed since the merge"


def _small_files(root: Path, manifest: dict[str, Any]) -> Iterator[str]:
    for name, digest in manifest["files"].items():
        path = root / name
        if not path.is_file():
            yield f"{path}: missing"
        elif digest not in _digests(path):
            yield f"{path}: changed since the merge"


def _digests(path: Path) -> Iterator[str]:
    """Digests of the file; for a model card, also without an evaluation that was added after the merge."""
    data = path.read_bytes()
    yield xxhash.xxh3_128_hexdigest(data)
    if path.name == "README.md":
        card = without_evaluation(data.decode("utf-8", "surrogateescape"))
        yield xxhash.xxh3_128_hexdigest(card.encode("utf-8", "surrogateescape"))


# Files that no loader reads; any other file could be taken for a part of the merge.
_HARMLESS = (".*", "*.md", "LICENSE*", "NOTICE*", "*.png", "*.jpg", "*.jpeg", "*.svg", "*.webp", "*.html")


def _strangers(root: Path, manifest: dict[str, Any]) -> list[str]:
    """Files that are not in the manifest; a folder without files of the merge is named once."""
    known = {MANIFEST, *manifest["shards"], *manifest["files"]}
    folders = {f"{parent}/" for name in known for parent in PurePosixPath(name).parents}
    found: dict[str, None] = {}
    todo = [""]
    while todo:
        folder = todo.pop()
        with os.scandir(root / folder) as entries:
            for entry in entries:
                name = folder + entry.name
                if name in known or any(fnmatch.fnmatchcase(entry.name, pattern) for pattern in _HARMLESS):
                    continue
                if entry.is_dir(follow_symlinks=False):
                    todo.append(f"{name}/")
                else:
                    outside = (f"{parent}/" for parent in reversed(PurePosixPath(name).parents))
                    found[next((each for each in outside if each not in folders), name)] = None
    return [f"{root / name}: not part of this merge" for name in sorted(found)]
