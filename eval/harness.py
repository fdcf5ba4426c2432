"""Runs lm-eval over subjects and tasks: the same items for every model, each answer remembered."""

from __future__ import annotations

import contextlib
import functools
import importlib
import io
import logging
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from eval.memory import Memory
from eval.missing import first_line, unloadable
from eval.models import Subject, check_files, directory, known_digest, remember_digest
from eval.results import Questions, Results, TaskResult, Verdicts
from eval.tasks import Task, suggest, task_manager
from merge.errors import MergeError, UsageError

_SMALL = 20_000_000  # parameters
_READ_FILES = ("hf", "vllm")  # run the weights in the directory; others ask a server, and what that runs is not known

# progress(model, task, requests answered, requests in all)
Progress = Callable[[str, str, int, int], None]


@dataclass(frozen=True)
class Settings:
    """How models are run; the same for all that are compared.

    Attributes:
        backend: lm-eval's name of a model type; "hf" loads a directory with transformers.
        model_args: further arguments of that type, in lm-eval's words.
        dtype: of weights and arithmetic; None: float32 on a CPU (bf16 is slow on most), else as stored.
        batch_size: sequences at once; 0: found automatically.
        limit: items of each task, drawn once by `seed` and then the same for every model; None: all.
        holdout, held_out: the share of each task's items that is set aside, drawn by `seed`, and which side is asked.
        chat_template: whether prompts are wrapped in the model's chat template.
    """

    backend: str = "hf"
    model_args: Mapping[str, Any] = field(default_factory=dict)
    device: str = "cpu"
    dtype: str | None = None
    batch_size: int = 0
    num_fewshot: int | None = None
    limit: int | None = None
    seed: int = 0
    holdout: float = 0.0
    held_out: bool = False
    chat_template: bool = False
    system_instruction: str | None = None
    include: Path | None = None
    unsafe_code: bool = False

    @property
    def used_dtype(self) -> str:
        return self.dtype or ("float32" if self.device == "cpu" else "auto")

    def of_numbers(self) -> dict[str, Any]:
        """What changes the numbers a request gets; the rest of a request is in its text."""
        return {
            "backend": self.backend,
            "dtype": self.used_dtype,
            "device": self.device.partition(":")[0],
            **dict(self.model_args),
        }


def evaluate(
    subjects: Sequence[Subject],
    tasks: Sequence[Task],
    settings: Settings,
    memory: Memory,
    *,
    keep: Path | None = None,
    progress: Progress = lambda model, task, done, total: None,
) -> Results:
    """Every subject on every task.

    Args:
        keep: where models merged on the fly stay; None: they are removed.

    Raises:
        MergeError: a model that cannot be loaded, a task whose data is missing, a model that gives NaN.
    """
    names = [subject.name for subject in subjects]
    if twice := [name for name in names if names.count(name) > 1]:
        raise UsageError(f"{twice[0]}: is named twice.")
    _quiet()
    loaded = load_tasks(tasks, settings)
    results = [_judge(subject, loaded, settings, memory, keep, progress) for subject in subjects]
    return Results.of(results, settings, loaded)


@dataclass
class Loaded:
    """A task with its data, and which of its items are asked."""

    task: Task
    tree: dict[str, Any]  # what lm-eval's TaskManager.load gives
    samples: dict[str, list[int]]  # of each leaf task; empty: all items
    n_requests: int = 0
    questions: Questions = field(default_factory=dict)


def load_tasks(tasks: Sequence[Task], settings: Settings) -> list[Loaded]:
    """Tasks with their data.

    Raises:
        MergeError: data that is neither cached nor reachable, of all tasks at once, with what to do.
        UsageError: settings that a task does not allow.
    """
    own = [task.spec for task in tasks if isinstance(task.spec, dict)]
    manager = task_manager(settings.include, len(own) < len(tasks))
    found, missing = [], []
    for task in tasks:
        try:
            tree = _load(manager, task)
        except Exception as error:  # lm-eval, datasets and the hub raise what they like
            missing.append((task, error))
            continue
        part = settings.limit or settings.holdout
        samples = {name: _sample(leaf, name, settings) for name, leaf in tree["tasks"].items()} if part else {}
        found.append(Loaded(task, tree, samples))
    if missing:
        raise unloadable(missing, known=len(found)) from missing[0][1]
    _check_settings(found, settings)
    return found


def _load(manager: Any, task: Task) -> dict[str, Any]:
    """A task's data, as lm-eval prepares it: some tasks shuffle the choices of their items while they are read.

    The items are held, so that every model gets the same ones; lm-eval would read them again for each.
    """
    _seed()
    with quietly():
        tree: dict[str, Any] = manager.load([task.spec])
    if task.nltk is not None:
        importlib.import_module("nltk").data.find(task.nltk)
    for leaf in tree["tasks"].values():
        read = "test_docs" if leaf.has_test_docs() else "validation_docs"
        setattr(leaf, read, functools.partial(_same, leaf.eval_docs))
    return tree


def _same(docs: Any) -> Any:
    return docs


def _seed() -> None:
    """As lm-eval's simple_evaluate does before it loads tasks."""
    import random

    import numpy as np
    from lm_eval.defaults import DEFAULT_OTHER_SEED, DEFAULT_RANDOM_SEED
    from lm_eval.utils import set_torch_seed

    random.seed(DEFAULT_RANDOM_SEED)
    np.random.seed(DEFAULT_OTHER_SEED)
    set_torch_seed(DEFAULT_OTHER_SEED)


def _check_settings(loaded: Sequence[Loaded], settings: Settings) -> None:
    """Raises UsageError for settings that a task does not allow, before a model is loaded."""
    fixed = [each.task.name for each in loaded if each.task.num_fewshot is not None]
    if fixed and settings.num_fewshot is not None:
        raise UsageError(
            f"--num-fewshot: the suite says how many examples {', '.join(fixed)} get. Leave it out, or name the tasks "
            "with --tasks."
        )
    shots: dict[str, int | None] = {}
    for each in loaded:
        for name in each.tree["tasks"]:
            if shots.setdefault(name, each.task.num_fewshot) != each.task.num_fewshot:
                raise UsageError(f"{name}: is asked by itself and in {each.task.name} or a suite, with other examples.")
    unsafe = [name for each in loaded for name, leaf in each.tree["tasks"].items() if _runs_code(leaf)]
    if unsafe and not settings.unsafe_code:
        raise UsageError(
            f"{', '.join(unsafe)}: runs code that the model writes, in a process with limits but without a proof that "
            "it does no harm. Allow it with --unsafe-code, or leave the task out with --tasks."
        )


def _runs_code(leaf: Any) -> bool:
    return bool(getattr(leaf, "UNSAFE_CODE", False))


def _sample(leaf: Any, name: str, settings: Settings) -> list[int]:
    """Which items are asked. The two sides of a split share none and make up the whole.

    Raises:
        MergeError: a side without items.
    """
    import random

    n = len(leaf.eval_docs)
    drawn = random.Random(f"{settings.seed}:{name}").sample(range(n), min(settings.limit or n, n))
    if settings.holdout:
        aside = round(settings.holdout * len(drawn))
        drawn = drawn[:aside] if settings.held_out else drawn[aside:]
    if not drawn:
        raise MergeError(f"{name}: {n} items cannot be split into {settings.holdout:g} and the rest.")
    return sorted(drawn)


def _judge(
    subject: Subject,
    loaded: Sequence[Loaded],
    settings: Settings,
    memory: Memory,
    keep: Path | None,
    progress: Progress,
) -> Verdicts:
    from eval.model_proxy import RememberingLM

    began = time.monotonic()
    with contextlib.ExitStack() as stack:
        digest = None if keep is not None else known_digest(subject, memory)
        path: Path | None = None
        if digest is None:
            path = stack.enter_context(directory(subject, keep))
            digest = remember_digest(subject, path, memory)

        @functools.cache
        def load() -> Any:
            at = path if path is not None else stack.enter_context(directory(subject, keep))
            return load_model(at, settings)

        numbers = settings.of_numbers()
        if settings.backend not in _READ_FILES:
            numbers["fingerprint"] = _fingerprint(subject, load)
        model = RememberingLM(load, memory, digest, numbers)
        done = [_one_task(subject, each, model, settings, progress) for each in loaded]
        return Verdicts(
            name=subject.name,
            text=subject.text,
            path=subject.place,
            digest=digest,
            parents=subject.parents,
            seconds=time.monotonic() - began,
            asked=model.asked,
            remembered=model.remembered,
            tasks=_joined(done),
        )


def _joined(done: Sequence[dict[str, TaskResult]]) -> dict[str, TaskResult]:
    """All results by name; of a task that is asked by itself and in a group, that of the group, which needs it."""
    found: dict[str, TaskResult] = {}
    for part in done:
        found |= {name: each for name, each in part.items() if each.group is not None or name not in found}
    return found


def _fingerprint(subject: Subject, load: Callable[[], Any]) -> list[Any]:
    """Raises MergeError if the server does not answer."""
    from eval.model_proxy import fingerprint

    try:
        with quietly():
            return fingerprint(load)
    except MergeError:
        raise
    except Exception as error:  # backends raise what they like
        raise MergeError(
            f"{subject.name}: the server does not answer ({_said(error)}). Name it with --model-args base_url=..."
        ) from error


def _said(error: Exception) -> str:
    return f"{type(error).__name__}: {first_line(error)}"


def _one_task(
    subject: Subject, each: Loaded, model: Any, settings: Settings, progress: Progress
) -> dict[str, TaskResult]:
    answered = 0

    def tick(n: int) -> None:
        nonlocal answered
        answered += n
        progress(subject.name, each.task.name, answered, each.n_requests)

    model.tick = tick
    tick(0)
    before = model.asked + model.remembered
    try:
        raw = _run(each, model, settings)
    except MergeError:
        raise
    except Exception as error:  # tasks, backends and tokenizers raise what they like
        raise MergeError(
            f"{subject.name} on {each.task.name}: lm-eval stopped with {type(error).__name__}: {first_line(error)}"
        ) from error
    each.n_requests = model.asked + model.remembered - before
    found, each.questions = TaskResult.read(each.task, raw)
    if each.task.score is not None:
        shown = each.task.score(found)
        found[shown.name] = shown
    return found


def _run(each: Loaded, model: Any, settings: Settings) -> dict[str, Any]:
    """lm-eval's own evaluation of one task, prepared as its simple_evaluate does.

    simple_evaluate itself would also describe the machine, which takes seconds for every call.
    """
    from lm_eval.defaults import DEFAULT_OTHER_SEED
    from lm_eval.evaluator import evaluate as evaluate_tasks

    _seed()
    for leaf in each.tree["tasks"].values():
        fewshot = leaf.get_config("num_fewshot")
        if each.task.num_fewshot is not None:
            leaf.set_config(key="num_fewshot", value=each.task.num_fewshot)
        elif fewshot is None or (settings.num_fewshot is not None and fewshot != 0):  # a task that says 0 means it
            leaf.set_config(key="num_fewshot", value=settings.num_fewshot or 0)
        leaf.set_fewshot_seed(seed=DEFAULT_OTHER_SEED)
    with quietly():
        found: dict[str, Any] = evaluate_tasks(
            lm=model,
            task_dict=each.tree,
            samples=each.samples or None,
            log_samples=True,
            system_instruction=settings.system_instruction,
            apply_chat_template=settings.chat_template,
            fewshot_as_multiturn=settings.chat_template,
            confirm_run_unsafe_code=settings.unsafe_code,
        )
    return found


def load_model(path: Path, settings: Settings) -> Any:
    """lm-eval's model of a directory.

    Raises:
        MergeError: a backend that is not installed, or a model that it cannot load.
    """
    from lm_eval.api.registry import get_model, model_registry

    try:
        kind = get_model(settings.backend)
    except (ValueError, KeyError):
        near = suggest(settings.backend, sorted(model_registry), 100)
        raise UsageError(f"--backend {settings.backend}: lm-eval has none of that name; {near}") from None
    arguments: dict[str, Any] = dict(settings.model_args)
    if settings.backend == "hf":
        arguments |= {"pretrained": str(path), "dtype": settings.used_dtype}
    elif settings.backend == "vllm":
        arguments |= {"pretrained": str(path), "dtype": settings.dtype or "auto"}
    else:
        arguments.setdefault("pretrained", str(path))
    try:
        with quietly():
            model = kind.create_from_arg_obj(
                arguments, {"batch_size": settings.batch_size or _batch_size(settings), "device": settings.device}
            )
    except Exception as error:  # backends raise what they like
        check_files(path)
        raise MergeError(
            f"{path}: {settings.backend} cannot load it: {type(error).__name__}: {first_line(error)}"
        ) from error
    if settings.backend == "hf" and settings.device == "cpu":
        _one_thread_if_small(model.model)
    return model


def _one_thread_if_small(model: Any) -> None:
    """Matrices of tiny models are not worth sharing: threads that wait for each other can take 15 times as long."""
    import torch

    if sum(parameter.numel() for parameter in model.parameters()) < _SMALL:
        torch.set_num_threads(1)


def _batch_size(settings: Settings) -> int | str:
    # On a GPU lm-eval finds the largest that fits. A CPU gains nothing from larger ones, and padding costs.
    return "auto" if settings.device.startswith("cuda") and settings.backend in ("hf", "vllm") else 8


def _quiet() -> None:
    """lm-eval, datasets and transformers talk much; what matters is said by this package."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    for name in ("lm_eval", "datasets"):
        logging.getLogger(name).setLevel(logging.ERROR)
    import datasets
    from transformers.utils import logging as transformers_logging

    datasets.disable_progress_bars()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()


@contextlib.contextmanager
def quietly() -> Iterator[None]:
    """Nothing inside draws a progress bar of tqdm's, or prints: there is one bar, and stdout is for results."""
    import tqdm

    before = tqdm.tqdm.__init__

    def silent(self: Any, *arguments: Any, **keywords: Any) -> None:
        before(self, *arguments, **keywords | {"disable": True})

    tqdm.tqdm.__init__ = silent
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        tqdm.tqdm.__init__ = before
