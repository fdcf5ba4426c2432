"""Reads a task file into a TaskSet: shared keys, each task's own keys, strategies and merges.

    strategy: [simultaneous, parallel]     one, or several to compare
    tasks:
      sort: {data: sort.jsonl, validation: sort-held-out.jsonl, max_steps: 200}
    merge: {merge_method: ties, parameters: {density: 0.5}}     one, or a list

A task's keys stand over the shared ones, flags over both. Every problem is reported at once, with its line.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from finetune.before import CONFIG, TASK_KEYS
from finetune.config import ConfigReader, flag_node, read_config
from finetune.keys import KEYS, Config, DataSource
from finetune.strategies.merges import Merge, read_merges
from finetune.trainables import TRAINABLES
from merge.schema.document import read_document, read_text
from merge.schema.keys import Key
from merge.schema.names import suggest

STRATEGIES = ("simultaneous", "sequential", "parallel")
_STRATEGY = Key("words", "how several tasks are trained", choices=STRATEGIES)
_WORKERS = Key("int", "processes of the parallel strategy", low=1, high=64)
_WEIGHT = Key("float", "share of a task in the simultaneous mixture", above=0)
# One value for all tasks: models are compared, continued and merged.
_SHARED = ("model", "out", "train", "adapter", "seed", "new_tokens", "eos_token", "pad_token", "chat_template")
_SHAPE = ("format", "prompt", "completion", "text")
_SEQUENTIAL = ("full", "partial", "bitfit", "lora", "qlora", "ia3", "prompt", "prefix", "bottleneck")
_NAME = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789-_."


@dataclass(frozen=True)
class TrainingTask:
    """One task. `config`: for a training of it alone, from the base; `weight`: in the mixture, None for all once."""

    name: str
    config: Config
    weight: float | None


@dataclass(frozen=True)
class TaskSet:
    """The contents of a task file. `shared`: the config without data; `folder`: that of the file."""

    tasks: tuple[TrainingTask, ...]
    strategies: tuple[str, ...]
    merges: tuple[Merge, ...]
    workers: int
    shared: Config
    folder: Path | None

    @property
    def out(self) -> Path:
        return Path(self.shared.out)


def load_tasks(file: str, flags: Mapping[str, Sequence[str]] | None = None, strategy: str | None = None) -> TaskSet:
    """Reads a tasks file, then the flags over it.

    Args:
        flags: as load_config; they override the keys of every task.
        strategy: in place of the file's, several joined by commas.

    Raises:
        RecipeError: all problems, with file and line.
    """
    flags = dict(flags or {})
    kind = dataclasses.replace(CONFIG, needs="model and tasks")
    root = read_document(read_text(Path(file), kind), file, kind)
    place = ConfigReader(file)
    shared: list[tuple[yaml.Node, yaml.Node]] = []
    own: dict[str, yaml.Node] = {}
    for name, key_node, value in place.pairs(root, "", "the config"):
        if name in TASK_KEYS:
            own[name] = value
        elif name not in KEYS:
            place.problem(key_node, f'unknown key "{name}"; {suggest(name, [*TASK_KEYS, *KEYS])}')
        elif name in ("data", "adapter"):
            place.problem(key_node, f'"{name}" cannot be a shared key of a config with tasks; {_INSTEAD[name]}')
        else:
            shared.append((key_node, value))
    for name in ("data", "adapter"):
        if name in flags:
            with place.at_flag(f"--{name}"):
                place.problem(0, f"the config has tasks; {_INSTEAD[name]}")
    strategies = _strategies(place, own.get("strategy"), root, strategy)
    tasks = _tasks(place, own.get("tasks"), root, shared, flags, strategies)
    base = _shared_config(place, root, shared, flags, tasks)
    merges: tuple[Merge, ...] = ()
    if "merge" in own:
        if "parallel" not in strategies:
            place.problem(place.lines["merge"], '"merge" belongs to strategy: parallel')
        merges = read_merges(place, own["merge"], [task.name for task in tasks], base.train)
    workers = place.integer(own.get("workers"), "workers", _WORKERS) or 1
    _check_tasks(place, tasks, strategies, base)
    place.raise_if_any()
    return TaskSet(tuple(tasks), strategies, merges, workers, base, Path(file).parent)


_INSTEAD = {
    "data": "each task names its own",
    "adapter": "name the base as model",
}


def _strategies(place: ConfigReader, node: yaml.Node | None, root: yaml.Node, flag: str | None) -> tuple[str, ...]:
    if flag is not None:
        node = flag_node([flag], "strategy", _STRATEGY)
    if node is None:
        place.problem(root, f'"strategy" is missing: one or several of {", ".join(STRATEGIES)}')
        return ()
    with place.at_flag(None if flag is None else "--strategy"):
        words = place.words(node, "strategy", _STRATEGY)
        if words == ():
            place.problem(node, f'"strategy" is empty; one or several of {", ".join(STRATEGIES)}')
    return tuple(dict.fromkeys(words or ()))


def _tasks(
    place: ConfigReader,
    node: yaml.Node | None,
    root: yaml.Node,
    shared: list[tuple[yaml.Node, yaml.Node]],
    flags: dict[str, Sequence[str]],
    strategies: tuple[str, ...],
) -> list[TrainingTask]:
    if node is None:
        place.problem(root, '"tasks" is missing: a name for each, with its data')
        return []
    tasks: list[TrainingTask] = []
    problems = place.n_problems
    for name, key_node, value in place.pairs(node, "tasks", '"tasks"'):
        if not name or name.startswith(".") or set(name) - set(_NAME):
            place.problem(key_node, f'the name of a task has letters, digits, "-", "_" and ".", not "{name}"')
            continue
        task = _task(place, name, key_node, value, shared, flags, strategies)
        if task is not None:
            tasks.append(task)
    if len(tasks) < 2 and place.n_problems == problems:
        place.problem(node, f"{len(tasks)} task; several tasks are trained and compared: name at least 2")
    return tasks


def _task(
    place: ConfigReader,
    name: str,
    at: yaml.Node,
    node: yaml.Node,
    shared: list[tuple[yaml.Node, yaml.Node]],
    flags: dict[str, Sequence[str]],
    strategies: tuple[str, ...],
) -> TrainingTask | None:
    if not isinstance(node, yaml.MappingNode):
        place.problem(node, f'task "{name}" must be a mapping with its data, such as {{data: {name}.jsonl}}')
        return None
    weight: float | None = None
    kept: list[tuple[yaml.Node, yaml.Node]] = []
    adapters = "sequential" in strategies
    for key, key_node, value in place.pairs(node, f"tasks.{name}", f'task "{name}"'):
        if key == "weight":
            weight = place.number(value, f"tasks.{name}.weight", _WEIGHT)
        elif key not in KEYS:
            place.problem(key_node, f'unknown key "{key}" of task "{name}"; {suggest(key, ["weight", *KEYS])}')
        elif key in _SHARED or (adapters and KEYS[key].group == "Adapters"):
            place.problem(key_node, f'"{key}" is one for all tasks; move it beside "tasks"')
        else:
            kept.append((key_node, value))
    given = {key.value for key, _ in kept}
    pairs = [*kept, *((key, value) for key, value in shared if key.value not in given)]
    part = ConfigReader(place.file)
    merged = yaml.MappingNode(node.tag, pairs, at.start_mark, node.end_mark)
    config = read_config(part, merged, flags)
    if config.validation is None and not part.n_problems:
        part.problem(
            at, f'task "{name}" has no "validation": a file, or a share such as 0.05, on which models are scored'
        )
    place.take_problems(part)
    return TrainingTask(name, config, weight)


def _shared_config(
    place: ConfigReader,
    root: yaml.MappingNode,
    shared: list[tuple[yaml.Node, yaml.Node]],
    flags: dict[str, Sequence[str]],
    tasks: list[TrainingTask],
) -> Config:
    part = ConfigReader(place.file)
    node = yaml.MappingNode(root.tag, shared, root.start_mark, root.end_mark)
    stand_in = {"data": (DataSource("tasks"),), "validation": tasks[0].config.validation if tasks else 0.1}
    config = read_config(part, node, flags, stand_in)
    place.take_problems(part)
    return config


def _check_tasks(place: ConfigReader, tasks: list[TrainingTask], strategies: tuple[str, ...], shared: Config) -> None:
    """Checks that involve all tasks."""
    at = place.line("tasks")
    encoder = shared.encoder_hidden is not None
    if "sequential" in strategies and (shared.train not in _SEQUENTIAL or encoder):
        what = f"{shared.train} with encoder_hidden" if encoder and shared.train in _SEQUENTIAL else shared.train
        place.problem(at, f"train: {what} cannot be continued, as strategy: sequential does")
    if "sequential" in strategies and shared.new_tokens and TRAINABLES[shared.train].adapter:
        place.problem(
            at, "an adapter being continued keeps its vocabulary: new_tokens cannot be combined with sequential"
        )
    if "simultaneous" not in strategies:
        return
    shares = {task.config.validation for task in tasks if not isinstance(task.config.validation, tuple)}
    if len(shares) > 1 or (shares and any(isinstance(task.config.validation, tuple) for task in tasks)):
        place.problem(at, 'for strategy: simultaneous give every task the same share as "validation", or a file each')
    weighted = [task for task in tasks if task.weight is not None]
    if weighted and len(weighted) < len(tasks):
        place.problem(at, 'give every task a "weight", or none')
    if weighted or any(source.weight is not None for task in tasks for source in task.config.data):
        for task in tasks:
            if len(task.config.data) > 1 and task.config.data[0].weight is None:
                message = f'task "{task.name}": tasks are mixed by weight, so its files need a weight each'
                place.problem(place.line(f"tasks.{task.name}"), message)


def mixture(tasks: TaskSet) -> Config:
    """The config of one training on all tasks: their data by weight, the shared settings, losses by task."""
    weighted = any(
        task.weight is not None or any(source.weight is not None for source in task.config.data) for task in tasks.tasks
    )
    data: list[DataSource] = []
    held: list[DataSource] = []
    for task in tasks.tasks:
        total = sum(source.weight or 1.0 for source in task.config.data)
        for source in task.config.data:
            share = (task.weight or 1.0) * (source.weight or 1.0) / total if weighted else None
            data.append(dataclasses.replace(_labelled(source, task), weight=share))
        if isinstance(task.config.validation, tuple):
            held += [_labelled(source.read_like(task.config.data[0]), task) for source in task.config.validation]
    validation = tuple(held) or tasks.tasks[0].config.validation
    return dataclasses.replace(tasks.shared, data=tuple(data), validation=validation)


def _shape(source: DataSource) -> dict[str, Any]:
    return {name: getattr(source, name) for name in _SHAPE}


def _labelled(source: DataSource, task: TrainingTask) -> DataSource:
    """With the task's name, and with the templates and format that the task gives to all its files."""
    shape = _shape(source)
    if not any(shape.values()):
        shape = {name: getattr(task.config, name) for name in _SHAPE}
    return dataclasses.replace(source, **shape, task=task.name)
