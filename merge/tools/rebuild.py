"""rebuild: an output merged again from the recipe and sources on record, and compared with what is there.

Where the methods promise it, tensors must have the same bytes. Elsewhere each number may be one step of the output's
dtype away, or 1e-6 of its tensor's largest magnitude: 14 times what MKL's code for different processors was seen to
change (docs/methods.md). The new result lies beside the output for a while, and is compared in blocks.
"""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import filelock
import numpy as np
import numpy.typing as npt

from merge.checkpoint.reader import SourceReader
from merge.checkpoint.safetensors_file import read_header
from merge.decode import to_float32
from merge.dtypes import DTYPES
from merge.engine.reproducible import is_bitwise
from merge.errors import CheckpointError, OutputError, RecipeError
from merge.jobs.pipelines.plan import PipelinePlanner
from merge.jobs.pipelines.run import run_pipeline
from merge.output.directory import LOCK, explained
from merge.output.manifest import read_manifest
from merge.plan import Plan, SourceFile, TensorRef
from merge.planning.load import parse_pipeline
from merge.quoting import some
from merge.recipe.pipeline import Pipeline

BOUND = 1e-6  # of a tensor's largest magnitude
_BLOCK = 1 << 18  # elements
_FREE = ("README.md", ".index.json")  # a card is prose, and sizes of shards are free


@dataclass(frozen=True)
class RebuildDifference:
    """A tensor that is not the same again: how many values differ, by at most how much, and relative to the largest."""

    name: str
    values: int
    of: int
    largest: float
    relative: float


@dataclass(frozen=True)
class Rebuild:
    """What merging again gave.

    Attributes:
        sources: what changed of the sources, one sentence each; if files have other sizes nothing was merged.
        equal: tensors with the same bytes.
        within: tensors that may differ, and do within the bound.
        outside: those beyond it, or that must not differ.
        other: tensors and small files that only one of the two has, or that differ in dtype, shape or content.
        versions: of packages that are not those of the first merge.
    """

    sources: tuple[str, ...] = ()
    equal: int = 0
    within: tuple[RebuildDifference, ...] = ()
    outside: tuple[RebuildDifference, ...] = ()
    other: tuple[str, ...] = ()
    versions: tuple[str, ...] = ()

    @property
    def agrees(self) -> bool:
        return not (self.sources or self.outside or self.other)


def rebuild(
    directory: str | os.PathLike[str],
    *,
    recipe_dir: str | os.PathLike[str] | None = None,
    threads: int | None = None,
    max_ram: int | None = None,
    device: str = "cpu",
    progress: Callable[[int], None] = lambda done: None,
) -> Rebuild:
    """Merges again what `directory`'s manifest describes, and compares. `verify_output` says whether that is sound.

    Args:
        recipe_dir: where the recipe lay: relative directories in it are looked for here and there.
        threads, max_ram, device: as for run_plan.
        progress: gets bytes of the output that are done.

    Raises:
        MergeError: there is nothing to merge again, or it cannot be done.
    """
    root = Path(directory)
    before = read_manifest(root)
    pipeline, plan = _planned(root, before, recipe_dir)
    changed = tuple(_changed_files(plan, before))
    versions = tuple(_versions(before))
    if changed:
        return Rebuild(changed, versions=versions)
    with _room(root) as room:
        out = room / "rebuilt"
        run_pipeline(
            pipeline,
            out,
            threads=threads,
            max_ram=max_ram,
            device=device,
            force=True,
            progress=lambda _, done: progress(done),
        )
        after = read_manifest(out)
        devices = (device, before.get("conditions", {}).get("device", "cpu"))
        exact = {step.name: all(is_bitwise(plan, step, each) for each in devices) for step in plan.steps}
        found = _compared(root, before, out, after, exact)
    sources = tuple(_changed_numbers(plan, before, after))
    within = tuple(each for each, fits in found if fits)
    outside = tuple(each for each, fits in found if not fits)
    other = tuple(_other(before, after))
    old = before["tensors"]
    same = sum(name in old and record["digest"] == old[name]["digest"] for name, record in after["tensors"].items())
    return Rebuild(sources, same, within, outside, other, versions)


@contextlib.contextmanager
def _room(root: Path) -> Iterator[Path]:
    """A directory beside the output, held by one run and removed at its end; one that a killed run left is taken."""
    place = root.absolute().with_name(f".{root.absolute().name}.rebuild")
    with explained(place.parent):
        place.mkdir(exist_ok=True)
        if any(place.iterdir()) and not (place / LOCK).is_file():
            raise OutputError(f"{place} exists and was not made by merge verify; nothing was changed. Move it away.")
        lock = filelock.FileLock(place / LOCK)
        try:
            lock.acquire(timeout=0)
        except filelock.Timeout:
            raise OutputError(f"{place} is in use by another run. Wait for it.") from None
    try:
        yield place
    finally:
        shutil.rmtree(place, ignore_errors=True)
        lock.release()


def _planned(
    root: Path, manifest: Mapping[str, Any], recipe_dir: str | os.PathLike[str] | None
) -> tuple[Pipeline, Plan]:
    text = manifest.get("recipe")
    if not isinstance(text, str) or not text:
        raise OutputError(f"{root} was not made from a recipe, so it cannot be merged again.")
    command = text.partition("\n")[0].removeprefix("# made by: ")
    if command.startswith("merge transplant "):  # its recipe names the parts, and not how rows are made
        raise OutputError(f"{root} was made by a command. Run it again, and compare with merge diff: {command}")
    file = os.path.join(recipe_dir or "", f"{manifest['name']}.yaml")  # an unnamed recipe is called by its file
    try:
        pipeline = parse_pipeline(text, file, manifest.get("compat"))
        return pipeline, PipelinePlanner(pipeline, root).planned[-1].plan
    except (RecipeError, CheckpointError) as error:
        raise OutputError(
            f"{root} cannot be merged again:\n{error}\nRelative directories are looked for here and in --recipe-dir."
        ) from error


def _changed_files(plan: Plan, manifest: Mapping[str, Any]) -> Iterator[str]:
    """Of each source, files whose size is not on record."""
    plans = (plan, *plan.stages)
    entries = [manifest["models"], *(stage["models"] for stage in manifest.get("stages", ()))]
    if [len(each.models) for each in plans] != [len(each) for each in entries]:
        yield "the recipe leads to other models than it did"
        return
    pairs = [pair for each, entry in zip(plans, entries, strict=True) for pair in zip(each.models, entry, strict=True)]
    for model, entry in pairs:
        found, recorded = {Path(file.path).name: file.size for file in model.files}, entry["files"]
        names = sorted(name for name in {*found, *recorded} if found.get(name) != recorded.get(name))
        if names:
            yield f"{model.ref}: changed since the merge: {some(names)} (another size, new or missing)"
        elif model.revision != entry["revision"]:
            yield f"{model.ref}: revision {model.revision}, and {entry['revision']} was merged"


def _changed_numbers(plan: Plan, before: Mapping[str, Any], after: Mapping[str, Any]) -> Iterator[str]:
    """Sources whose files have the same sizes and other numbers."""
    for old, new in zip(before["models"], after["models"], strict=True):
        if old["digest"] != new["digest"]:
            yield f"{new['model']}: changed since the merge: its tensors have other numbers"
    files: dict[str, None] = {}
    for step in plan.steps:
        old, new = (each["tensors"].get(step.name, {}).get("statistics", ()) for each in (before, after))
        files |= {ref.file: None for ref, a, b in zip(step.statistics, old, new, strict=False) if a != b}
    for file in files:
        yield f"{file}: changed since the merge: it has other statistics"


def _versions(manifest: Mapping[str, Any]) -> Iterator[str]:
    recorded = dict(manifest.get("tool", {}))
    if "conditions" in manifest:
        recorded["torch"] = manifest["conditions"].get("torch")
    for name, version in recorded.items():
        if (here := metadata.version(name)).partition("+")[0] != str(version).partition("+")[0]:
            yield f"{name} {version}, and here it is {here}"


def _other(before: Mapping[str, Any], after: Mapping[str, Any]) -> Iterator[str]:
    old, new = before["tensors"], after["tensors"]
    for name in dict.fromkeys([*old, *new]):
        if name not in new or name not in old:
            yield f"{name}: only in {'the output' if name in old else 'what was merged again'}"
        elif any(old[name].get(key) != new[name][key] for key in ("dtype", "shape")):
            found, again = (f"{each['dtype']} {each['shape']}" for each in (old[name], new[name]))
            yield f"{name}: {found}, and merged again {again}"
    for name in dict.fromkeys([*before["files"], *after["files"]]):
        if before["files"].get(name) != after["files"].get(name) and not name.endswith(_FREE):
            yield f"{name}: not the same when merged again"


def _compared(
    root: Path, before: Mapping[str, Any], out: Path, after: Mapping[str, Any], exact: Mapping[str, bool]
) -> list[tuple[RebuildDifference, bool]]:
    """Of every tensor whose digest is another: what differs, and whether it may."""
    differ = [
        name
        for name, record in after["tensors"].items()
        if name in before["tensors"]
        and record["digest"] != before["tensors"][name]["digest"]
        and all(record[key] == before["tensors"][name].get(key) for key in ("dtype", "shape"))
    ]
    if not differ:
        return []
    old, new = _refs(root, before), _refs(out, after)
    found = []
    files = dict.fromkeys(ref.file for ref in (*old.values(), *new.values()))
    with SourceReader(map(SourceFile.now, files)) as reader:
        for name in differ:
            largest = float(after["tensors"][name].get("absmax") or 0.0)
            difference, fits = _difference(reader, name, old[name], new[name], largest)
            found.append((difference, fits and not exact[name]))
    return found


def _refs(root: Path, manifest: Mapping[str, Any]) -> dict[str, TensorRef]:
    """By name in the manifest: tensors of a module in a folder of its own are called FOLDER/NAME."""
    refs: dict[str, TensorRef] = {}
    for shard in manifest["shards"]:
        folder = shard.rpartition("/")[0]
        for ref in read_header(str(root / shard))[0]:
            refs[f"{folder}/{ref.name}" if folder else ref.name] = ref
    return refs


def _difference(
    reader: SourceReader, name: str, old: TensorRef, new: TensorRef, largest: float
) -> tuple[RebuildDifference, bool]:
    count, most, fits = 0, 0.0, True
    for start in range(0, new.size, _BLOCK):
        (codes_a, a), (codes_b, b) = (_read(reader, ref, start, min(_BLOCK, new.size - start)) for ref in (old, new))
        differ = codes_a != codes_b
        if not differ.any():
            continue
        with np.errstate(invalid="ignore", over="ignore"):
            apart = np.abs(a[differ] - b[differ])
        steps = np.abs(_in_order(codes_a[differ]) - _in_order(codes_b[differ]))
        count += int(differ.sum())
        most = max(most, float(np.nan_to_num(apart, nan=np.inf).max()))
        fits &= DTYPES[new.dtype].is_float and bool(((steps <= 1) | (apart <= BOUND * largest)).all())
    return RebuildDifference(name, count, new.size, most, most / largest if largest else float("inf")), fits


def _read(reader: SourceReader, ref: TensorRef, start: int, n: int) -> tuple[npt.NDArray[Any], npt.NDArray[np.float64]]:
    """The numbers as bits and as float64."""
    raw = np.empty(n, DTYPES[ref.dtype].numpy_name)
    reader.read_into(ref, start, raw)
    if not DTYPES[ref.dtype].is_float or ref.dtype == "F64":
        return raw.view(f"u{raw.itemsize}"), raw.astype(np.float64)
    values = np.empty(n, np.float32)
    to_float32(ref.dtype, raw, values)
    return raw.view(f"u{raw.itemsize}"), values.astype(np.float64)


def _in_order(codes: npt.NDArray[Any]) -> npt.NDArray[np.float64]:
    """Bits of floating-point numbers -> whole numbers in the order of their values: neighbours differ by 1"""
    sign = np.array(1 << (8 * codes.itemsize - 1), codes.dtype)
    size: npt.NDArray[np.float64] = (codes & ~sign).astype(np.float64)
    size[(codes & sign) != 0] *= -1
    return size
