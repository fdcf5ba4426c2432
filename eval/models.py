"""Subjects of an evaluation: directories, hub ids, `model+adapter`, and recipes, merged when needed.

A subject is known by the digest of its weights, config and tokenizer. For a recipe that digest is remembered by its
plan, so that a merge whose answers are all known is not even made again.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import xxhash

from eval.memory import Memory, key_of
from merge.adapters.files import WEIGHTS as ADAPTERS
from merge.adapters.files import refuse_alone
from merge.checkpoint.checkpoint import open_checkpoint
from merge.checkpoint.digest import file_digest
from merge.checkpoint.files import read_json, weight_file
from merge.checkpoint.hub import locate
from merge.checkpoint.layout import find_weights
from merge.checkpoint.side_files import is_weights, list_side_files, module_folders
from merge.checkpoint.trust import is_trusted, remember_name
from merge.errors import CheckpointError, OutputError, SourceChanged, UsageError
from merge.output.manifest import read_manifest
from merge.output.scratch import remove_left, scratch
from merge.plan import Plan, SourceFile, SourceModel
from merge.recipe.model import ModelRef
from merge.recipe.pipeline import Pipeline
from merge.recipe.references import GGUF, parse_reference

_SCRATCH = "merge-eval-model-"
_TOKENIZERS = ("tokenizer.", "spiece", "sentencepiece", "tekken", "vocab")


@dataclass(frozen=True)
class Subject:
    """One model to judge.

    Attributes:
        text: as the user gave it.
        name: a short name that no other subject has.
        path: its directory; None for what is merged on the fly.
        plan: of what is merged on the fly; of a pipeline, the last stage's.
        earlier, pipeline: the plans of a pipeline's other stages, and the pipeline.
    """

    text: str
    name: str
    path: Path | None = None
    plan: Plan | None = None
    earlier: tuple[Plan, ...] = ()
    pipeline: Pipeline | None = None

    @property
    def place(self) -> str | None:
        """Its directory, or BASE+ADAPTER of directories; None for recipes."""
        if self.path is not None:
            return str(self.path.resolve())
        single = self.plan is not None and self.plan.models and self.plan.models[0].ref == self.text
        return _place(self.plan.models[0]) if self.plan is not None and single else None

    @property
    def parents(self) -> tuple[str, ...]:
        """The models that a merge is made of: their paths, or for a merge on disk their names in its manifest."""
        if self.path is not None:
            return _made_of(self.path)
        assert self.plan is not None
        models = [model for plan in (*self.earlier, self.plan) for model in plan.models]
        if self.place is None:
            return tuple(dict.fromkeys(map(_place, models)))
        base, *adapters = (models[0].path, *_adapters(models[0]))
        merged = [f"{base}+{each}" for adapter in adapters for each in _made_of(Path(adapter))]
        return (base, *merged)  # an adapter is made for its base


def _made_of(folder: Path) -> tuple[str, ...]:
    """The models that a merge's manifest names; () if there is no manifest."""
    try:
        return tuple(str(model["model"]) for model in read_manifest(folder)["models"])
    except (OutputError, KeyError, TypeError):
        return ()


def _adapters(model: SourceModel) -> list[str]:
    folders = (os.path.dirname(file.path) for file in model.files if os.path.basename(file.path) in ADAPTERS)
    return [folder for folder in folders if folder != model.path]


def _place(model: SourceModel) -> str:
    return "+".join([model.path, *_adapters(model)])


def subjects(texts: list[str]) -> list[Subject]:
    """The subjects that the texts name, each with a unique name.

    Raises:
        UsageError: a text that names nothing.
        MergeError: a recipe or model that is wrong.
    """
    found = [_subject(text) for text in texts]
    names = [each.name for each in found]
    for place, each in enumerate(found):
        if names.count(each.name) > 1:
            found[place] = dataclasses.replace(each, name=each.text)
    return found


def is_recipe(text: str) -> bool:
    """Whether the text names a recipe."""
    return text.endswith((".yaml", ".yml"))


def is_written_first(text: str) -> bool:
    """Whether what the text names has to be written as a checkpoint before it can be loaded: recipes and GGUF files."""
    return is_recipe(text) or GGUF in text


def _subject(text: str) -> Subject:
    if is_recipe(text):
        return _recipe(text)
    try:
        ref = parse_reference(text)
    except ValueError as error:
        raise UsageError(f"{error}. Name a model directory, a hub id, model+adapter, or a recipe file.") from None
    if ref.adapter is not None or ref.path.endswith(GGUF):
        from merge import build_plan
        from merge.planning.resolve import made_recipe
        from merge.recipe.model import Recipe, Source

        plan = build_plan(made_recipe(Recipe("passthrough", (Source(ref),))))
        return Subject(text, Path(ref.path if ref.adapter is None else ref.adapter.path).name, plan=plan)
    path = Path(locate(ref).path)
    refuse_alone(str(path))
    name = path.name if os.path.isdir(os.path.expanduser(ref.path)) else ref.path.rpartition("/")[2]
    return Subject(text, name if ref.revision is None else text, path=path)


def _recipe(file: str) -> Subject:
    from merge.jobs.build import SHARD_BYTES
    from merge.jobs.pipelines.plan import PipelinePlanner, stages_dir_of
    from merge.planning.load import load_pipeline

    pipeline = load_pipeline(file)
    out = Path("merged")  # stands for its future directory in plans
    *earlier, last = PipelinePlanner(pipeline, out, stages_dir_of(out), False, SHARD_BYTES).planned
    return Subject(
        file, last.plan.name, None, last.plan, tuple(stage.plan for stage in earlier), pipeline if earlier else None
    )


@contextlib.contextmanager
def directory(subject: Subject, keep: Path | None = None) -> Iterator[Path]:
    """The subject's directory; a recipe is merged now, and its result removed at the end unless it is kept.

    Args:
        keep: where merges stay, each under its name.
    """
    if subject.path is not None:
        yield subject.path
        return
    if keep is not None:
        remember_name(str(keep / subject.name), subject.text)
        _make(subject, keep / subject.name)
        yield keep / subject.name
        return
    with scratch(_SCRATCH, os.environ.get("MERGE_EVAL_TMP")) as work:
        remember_name(str(work / "model"), subject.text)
        _make(subject, work / "model")
        yield work / "model"


def remove_left_models() -> None:
    """Removes what killed evaluations merged on the fly; one that has all its answers makes no model itself."""
    remove_left(_SCRATCH, os.environ.get("MERGE_EVAL_TMP"))


def _make(subject: Subject, out: Path) -> None:
    if subject.pipeline is not None:
        from merge.jobs.pipelines.run import run_pipeline

        run_pipeline(subject.pipeline, out, force=True)
        return
    from merge import run_plan

    assert subject.plan is not None
    run_plan(subject.plan, out, force=True)


def known_digest(subject: Subject, memory: Memory) -> str | None:
    """The subject's digest if it is known without merging."""
    if subject.path is not None:
        return directory_digest(subject.path, memory)
    return memory.digest(_plan_key(subject))


def remember_digest(subject: Subject, path: Path, memory: Memory) -> str:
    """Computes and stores the digest of the subject, which is in `path`."""
    digest = directory_digest(path, memory)
    if subject.plan is not None:
        memory.store_digest(_plan_key(subject), digest)
    return digest


def _plan_key(subject: Subject) -> bytes:
    """The key of a plan, which holds its recipe and the state of every file that it reads."""
    assert subject.plan is not None
    return key_of("plan", *(plan.to_json() for plan in (*subject.earlier, subject.plan)))


def directory_digest(path: Path, memory: Memory) -> str:
    """Digest of everything in a model directory that its answers depend on: weights, config, tokenizer, templates."""
    parts = [(name, _file_digest(file, memory)) for name, file in _files(path)]
    return xxhash.xxh3_128_hexdigest(json.dumps(parts).encode())


def weights_of(subject: Subject) -> tuple[SourceFile, ...]:
    """The weight files of a subject, or of the models it is merged from."""
    if subject.path is not None:
        return open_checkpoint(ModelRef(subject.text, str(subject.path))).files
    assert subject.plan is not None
    return tuple(file for model in subject.plan.models for file in model.files)


def watch(path: Path) -> Callable[[], None]:
    """A function that raises SourceChanged if a file of the model directory has changed since now."""
    before = [SourceFile.now(file) for _, file in _files(path)]

    def check() -> None:
        for file in before:
            if not os.path.exists(file.path) or SourceFile.now(file.path) != file:
                raise SourceChanged(
                    f"{file.path}: changed while the model was evaluated. Run again; earlier answers are kept."
                )

    return check


def _files(path: Path) -> list[tuple[str, Path]]:
    """(name, path) of the files that a model's answers depend on, by name."""
    folders = [str(path), *(str(path / folder) for folder in module_folders(str(path)))]
    folders = [folder for folder in folders if folder == str(path) or any(map(is_weights, os.listdir(folder)))]
    names = [Path(weight_file(folder, name)) for folder in folders for name in find_weights(folder).files]
    names += [path / name for name in (*list_side_files(str(path)), "config.json")]
    names += path.glob("*.py") if is_trusted(str(path)) else ()  # code that runs
    return sorted(
        {str(name.relative_to(path)) if name.is_relative_to(path) else str(name): name for name in names}.items()
    )


def check_files(path: Path) -> None:
    """Raises CheckpointError with the name of a file that is missing, cut short, or no JSON where it should be."""
    open_checkpoint(ModelRef(str(path), str(path)))
    names = list_side_files(str(path))
    if not any(name.startswith(_TOKENIZERS) for name in names):
        raise CheckpointError(f"{path}: holds no tokenizer. Copy the tokenizer's files of its base into it.")
    for name in names:
        if not (path / name).exists():
            raise CheckpointError(f"{path / name}: is a link to a file that is gone. Download the file again.")
        if name.endswith(".json"):
            read_json(str(path / name), unique=False)


def _file_digest(path: Path, memory: Memory) -> str:
    key = key_of("file", *dataclasses.astuple(SourceFile.now(path.resolve())))
    known = memory.digest(key)
    if known is None:
        known = file_digest(path)
        memory.store_digest(key, known)
    return known
