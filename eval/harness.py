"""Runs lm-eval over subjects and tasks, with the same items for every model, and stores each answer."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from eval.backends import fingerprint_of, load_model
from eval.items import LoadedTask, load_tasks, runs_code, seed
from eval.memory import Memory, key_of
from eval.models import Subject, directory, known_digest, remember_digest, remove_left_models, watch
from eval.quiet import quiet, quietly
from eval.results import ModelScores, Results, TaskResult
from eval.settings import Settings
from eval.tasks.task import Task
from merge.errors import MergeError, UsageError, first_line

if TYPE_CHECKING:
    from lm_eval.api.model import LM

    from eval.ensemble import EnsembleLM
    from eval.model_proxy import RememberingLM

    JudgedModel = RememberingLM | EnsembleLM
    Opened = Callable[[Subject, contextlib.ExitStack], RememberingLM]

_READ_FILES = ("hf", "vllm")  # these run the weights in the directory; others ask a server, whose weights are unknown


def _no_progress(model: str, task: str, done: int, total: int) -> None:
    pass


# progress(model, task, requests answered, requests in all)
Progress = Callable[[str, str, int, int], None]


def evaluate(
    subjects: Sequence[Subject],
    tasks: Sequence[Task],
    settings: Settings,
    memory: Memory,
    *,
    ensembles: Sequence[Sequence[Subject]] = (),
    keep: Path | None = None,
    progress: Progress = _no_progress,
) -> Results:
    """Evaluates every subject on every task.

    Args:
        ensembles: models that answer together, each as one more row.
        keep: directory for models merged on the fly; None: they are removed.

    Raises:
        MergeError: a model that cannot be loaded, a task whose data is missing, a model that gives NaN.
    """
    names = [subject.name for subject in subjects]
    if twice := [name for name in names if names.count(name) > 1]:
        raise UsageError(f"{twice[0]}: is named twice.")
    quiet()
    remove_left_models()
    loaded = load_tasks(tasks, settings)
    judge = Examiner(loaded, settings, memory, keep, progress)
    results = [judge.one(subject) for subject in subjects]
    results += [judge.ensemble(members) for members in ensembles]
    return Results.of(results, settings, loaded)


@dataclass(frozen=True)
class Examiner:
    """What all subjects of one evaluation share: the items, and how they are asked."""

    loaded: Sequence[LoadedTask]
    settings: Settings
    memory: Memory
    keep: Path | None = None
    progress: Progress = _no_progress

    def one(self, subject: Subject, opened: Opened | None = None) -> ModelScores:
        """`opened`: the subject as a model; by default it is loaded from its directory when it is needed."""
        began = time.monotonic()
        with contextlib.ExitStack() as stack:
            model = (opened or self.open)(subject, stack)
            tasks = self._tasks(subject.name, model)
            return ModelScores(
                name=subject.name,
                text=subject.text,
                path=subject.place,
                digest=model.digest,
                parents=subject.parents,
                seconds=time.monotonic() - began,
                asked=model.asked,
                remembered=model.remembered,
                tasks=tasks,
            )

    def ensemble(self, members: Sequence[Subject]) -> ModelScores:
        """The members' answers taken together; see eval/ensemble.py."""
        from eval.ensemble import EnsembleLM

        began = time.monotonic()
        name = f"ensemble of {', '.join(member.name for member in members)}"
        with contextlib.ExitStack() as stack:
            models = [self.open(member, stack) for member in members]
            model = EnsembleLM(models)
            tasks = self._tasks(name, model)
            digest = key_of("ensemble", *(one.digest for one in models)).hex()
            seconds = time.monotonic() - began
            return ModelScores(name, name, None, digest, (), seconds, model.asked, model.remembered, tasks)

    def open(self, subject: Subject, stack: contextlib.ExitStack) -> RememberingLM:
        """The subject as a model that is loaded when it is needed; `stack` removes what is merged for it."""
        from eval.model_proxy import RememberingLM

        unchanged = watch(subject.path) if subject.path is not None else lambda: None
        digest = None if self.keep is not None else known_digest(subject, self.memory)
        path: Path | None = None
        if digest is None:
            path = stack.enter_context(directory(subject, self.keep))
            digest = remember_digest(subject, path, self.memory)

        @functools.cache
        def place() -> Path:
            return path if path is not None else stack.enter_context(directory(subject, self.keep))

        def load() -> LM:
            return load_model(place(), self.settings)

        numbers = self.settings.of_numbers()
        if self.settings.backend not in _READ_FILES:
            load = functools.cache(load)  # a server's tokenizer
            numbers["fingerprint"] = fingerprint_of(subject, load)
        return RememberingLM(load, self.memory, digest, numbers, unchanged)

    def _tasks(self, name: str, model: JudgedModel) -> dict[str, TaskResult]:
        return _joined([_one_task(name, each, model, self.settings, self.progress) for each in self.loaded])


def _joined(done: Sequence[dict[str, TaskResult]]) -> dict[str, TaskResult]:
    """All results by name; of a task asked both by itself and in a group, the one that the group needs."""
    found: dict[str, TaskResult] = {}
    for part in done:
        found |= {name: each for name, each in part.items() if each.group is not None or name not in found}
    return found


def _one_task(
    name: str, each: LoadedTask, model: JudgedModel, settings: Settings, progress: Progress
) -> dict[str, TaskResult]:
    answered = 0

    def tick(n: int) -> None:
        nonlocal answered
        answered += n
        progress(name, each.task.name, answered, each.n_requests)

    model.tick = tick
    tick(0)
    before = model.asked + model.remembered
    try:
        raw = _run(each, model, settings)
    except MergeError:
        raise
    except Exception as error:  # tasks, backends and tokenizers may raise any error
        raise MergeError(
            f"{name} on {each.task.name}: lm-eval stopped with {type(error).__name__}: {first_line(error)}"
        ) from error
    each.n_requests = model.asked + model.remembered - before
    found, each.questions = TaskResult.read(each.task, raw)
    for task, leaf in each.tree["tasks"].items():
        if task in found and runs_code(leaf):
            layers = each.task.guard() if each.task.guard is not None else ()
            found[task] = dataclasses.replace(found[task], guard=layers)
    if each.task.score is not None:
        shown = each.task.score(found)
        found[shown.name] = shown
    return found


def _run(each: LoadedTask, model: JudgedModel, settings: Settings) -> dict[str, object]:
    """lm-eval's own evaluation of one task, prepared as its simple_evaluate does.

    simple_evaluate itself would also describe the machine, which takes seconds for every call.
    """
    from lm_eval.defaults import DEFAULT_OTHER_SEED
    from lm_eval.evaluator import evaluate as evaluate_tasks

    seed()
    for leaf in each.tree["tasks"].values():
        fewshot = leaf.get_config("num_fewshot")
        if each.task.num_fewshot is not None:
            leaf.set_config(key="num_fewshot", value=each.task.num_fewshot)
        elif fewshot is None or (settings.num_fewshot is not None and fewshot != 0):  # 0 is a valid number of examples
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
