"""Completes the recipes of a task file: fills the trained models in as inputs.

A part is a recipe without models. `tasks: {sort: {weight: 0.7}}` gives parameters to single inputs. LoRA adapters are
folded into the base, unless the part says `fold: false`: then the adapters themselves are merged, into an adapter.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from finetune.trainables import TRAINABLES, make_trainable
from merge.adapters.inputs import refused_models, unfit
from merge.errors import Problem, RecipeError
from merge.jobs.build import build_plan
from merge.loading import model_from_config
from merge.methods import all_methods, known_method
from merge.output.manifest import MANIFEST, read_manifest
from merge.output.scratch import scratch
from merge.output.shards import header_text
from merge.output.workspace import settle
from merge.planning.resolve import resolve
from merge.recipe.build import draft_of
from merge.schema.reader import join
from merge.schema.scalars import MAP, SEQ, STR

if TYPE_CHECKING:
    from finetune.config import ConfigReader
    from finetune.prepare import Prepared

_LORA = ("lora", "qlora")
_STAND_IN = "task:"  # begins what stands for a model to be trained; no hub id has a colon
_FILLED = ("models", "slices", "modules")


@dataclass(frozen=True)
class Merge:
    """One recipe part. `node`: its keys as written; `parameters`: task -> node; `fold`: models are merged."""

    name: str
    method: str
    node: yaml.MappingNode
    parameters: Mapping[str, yaml.Node]
    fold: bool
    file: str | None

    def recipe(self, base: str, inputs: Mapping[str, str]) -> yaml.MappingNode:
        """The whole recipe. `inputs`: task -> model, or adapter if not `fold`. Its nodes know the part's lines."""
        given = {key.value for key, _ in self.node.value}
        pairs = list(self.node.value)
        if "base_model" not in given and self.fold and self._base_is_required():
            pairs.append((self._text("base_model"), self._text(base)))
        models: list[yaml.Node] = []
        for task, model in inputs.items():
            source: list[tuple[yaml.Node, yaml.Node]] = [(self._text("model"), self._text(model))]
            if task in self.parameters:
                source.append((self._text("parameters"), self.parameters[task]))
            models.append(yaml.MappingNode(MAP, source, *self._marks()))
        pairs.append((self._text("models"), yaml.SequenceNode(SEQ, models, *self._marks())))
        return yaml.MappingNode(MAP, pairs, *self._marks())

    def listed(self, base: str, outs: Mapping[str, str], adapters: bool) -> dict[str, str]:
        """task -> the reference to its result in a recipe. `outs`: where the results are."""
        return {name: f"{base}+{out}" if adapters and self.fold else out for name, out in outs.items()}

    def text(self, base: str, inputs: Mapping[str, str]) -> str:
        return str(yaml.serialize(self.recipe(base, inputs), Dumper=yaml.SafeDumper))

    def _base_is_required(self) -> bool:
        method = all_methods().get(self.method)
        return method is not None and method.base == "required"

    def _marks(self) -> tuple[yaml.Mark, yaml.Mark]:
        return self.node.start_mark, self.node.end_mark

    def _text(self, text: str) -> yaml.ScalarNode:
        return yaml.ScalarNode(STR, text, *self._marks())


def read_merges(place: ConfigReader, node: yaml.Node, tasks: Sequence[str], train: str) -> tuple[Merge, ...]:
    """One part, or a list; problems go to `place`, those of the recipes too, with their lines."""
    parts = place.items(node, "merge") if isinstance(node, yaml.SequenceNode) else [node]
    if not parts:
        place.problem(node, '"merge" is empty; give it a recipe such as {merge_method: ties}')
    if TRAINABLES[train].adapter and train not in _LORA:
        place.problem(
            node, f"train: {train} makes nothing that a recipe can merge; use full, partial, bitfit, lora or qlora"
        )
        return ()
    merges: list[Merge] = []
    for i, part in enumerate(parts):
        merge = _read_merge(place, part, f"merge.{i}", tasks, train, [merge.name for merge in merges])
        if merge is not None:
            merges.append(merge)
    return tuple(merges)


def _read_merge(
    place: ConfigReader, node: yaml.Node, path: str, tasks: Sequence[str], train: str, taken: Sequence[str]
) -> Merge | None:
    kept: list[tuple[yaml.Node, yaml.Node]] = []
    parameters: dict[str, yaml.Node] = {}
    fold, name, method = True, "", ""
    for key, key_node, value in place.pairs(node, path, "a recipe"):
        if key in _FILLED:
            place.problem(key_node, f'"{key}" is filled in here: the models are the trained tasks')
        elif key == "experts":
            place.problem(key_node, "a mixture of experts is made with merge run, from trained models")
            return None
        elif key == "tasks":
            parameters = {task: one for task, _, one in place.pairs(value, f"{path}.tasks", '"tasks"')}
            for task in parameters.keys() - set(tasks):
                place.problem(value, f'"{task}" is not a task; there are {", ".join(tasks)}')
        elif key == "fold":
            given = place.boolean(value, join(path, "fold"))
            if given is not None and train not in _LORA:
                place.problem(value, '"fold" belongs to train: lora or qlora')
            if given is None or train not in _LORA:
                return None
            fold = given
        else:
            kept.append((key_node, value))
            if isinstance(value, yaml.ScalarNode):
                name = value.value if key == "name" else name
                method = value.value if key == "merge_method" else method
    if not isinstance(node, yaml.MappingNode):
        return None
    stem = name or method
    number = 2
    name = stem
    while name in taken:
        name, number = f"{stem}-{number}", number + 1
    merge = Merge(
        name, method, yaml.MappingNode(node.tag, kept, node.start_mark, node.end_mark), parameters, fold, place.file
    )
    if tasks:
        _check(place, merge, tasks)
    return merge


def _check(place: ConfigReader, merge: Merge, tasks: Sequence[str]) -> None:
    """Reads the recipe as if the tasks were trained, so that all problems in its text are reported now."""
    inputs = {task: _STAND_IN + task for task in tasks}
    base = _STAND_IN + "base"
    try:
        draft = draft_of(merge.recipe(base, inputs), "", merge.file)
        recipe = resolve(draft, {base: False} | dict.fromkeys(inputs.values(), not merge.fold))
        method = known_method(recipe.merge_method)
        if not merge.fold and (problems := list(unfit(recipe, method))):
            raise RecipeError(problems)
        if merge.fold and method.inputs == "adapters":
            said = f"{method.name} merges LoRA adapters, and these are models."
            raise RecipeError(Problem(said, recipe.where("merge_method"), 'Use train: lora and "fold: false".'))
        if merge.fold and (problems := refused_models(recipe, method)):
            raise RecipeError(problems)
    except RecipeError as error:
        place.add(_by_task(error, _STAND_IN))


def _by_task(error: RecipeError, stand_in: str) -> list[Problem]:
    """The problems, with models named by their tasks."""
    return [dataclasses.replace(problem, message=problem.message.replace(stand_in, "")) for problem in error.problems]


def check_merges(merges: Sequence[Merge], prepared: Mapping[str, Prepared]) -> None:
    """Plans every recipe before anything is trained, with stand-ins for the tasks: for models the base, for adapters
    files of the shapes that training will write.

    Raises:
        MergeError: what does not fit this model, or what make_trainable raises.
    """
    if not merges:
        return
    base = base_of(prepared)
    with scratch("merge-finetune-") as folder:
        inputs = {task: str(folder / task) for task in prepared}
        adapters = next(iter(prepared.values())).config.train in _LORA
        for task, path in inputs.items():
            if adapters:
                _adapter_headers(prepared[task], Path(path))
            else:
                Path(path).symlink_to(Path(base).absolute(), target_is_directory=True)
        for merge in merges:
            listed = merge.listed(base, inputs, adapters)
            recipe = resolve(draft_of(merge.recipe(base, listed), merge.text(base, listed), merge.file))
            grown = any(one.new_ids for one in prepared.values()) and not adapters
            if grown and recipe.base_model is not None and not (recipe.tokenizer_source or recipe.tokenizer):
                said = "the trained models have new_tokens that the base lacks."
                raise RecipeError(Problem(said, recipe.where("merge_method"), "Set tokenizer_source: union."))
            try:
                build_plan(recipe)
            except RecipeError as error:
                raise RecipeError(_by_task(error, f"{folder}/")) from None


def _adapter_headers(prepared: Prepared, folder: Path) -> None:
    """An adapter as training will write it, without its numbers: PEFT's own modules, of a model without memory."""
    import torch
    from peft import get_peft_model_state_dict

    objective = prepared.objective
    with torch.device("meta"):
        model = model_from_config(objective.model_class, prepared.base.config, prepared.base.path)
        if prepared.new_ids:
            model.resize_token_embeddings(len(prepared.base.tokenizer), mean_resizing=False)
        config = dataclasses.replace(prepared.config, train="lora")
        model = make_trainable(model, config, objective.task_type, list(prepared.new_ids))
        state = get_peft_model_state_dict(model, save_embedding_layers=False)
    shapes = {name: tuple(value.shape) for name, value in state.items()}
    header, _ = header_text(shapes, {"format": "pt"})
    model.peft_config["default"].save_pretrained(str(folder))
    with (folder / "adapter_model.safetensors").open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        file.truncate(file.tell() + sum(4 * math.prod(shape) for shape in shapes.values()))


def base_of(prepared: Mapping[str, Prepared]) -> str:
    """All tasks have one base."""
    return next(iter(prepared.values())).base.path


def run_merge(merge: Merge, base: str, inputs: Mapping[str, str], out: Path, *, again: bool, **options: Any) -> bool:
    """Carries the recipe out. `again`: even if `out` is its result already. Returns whether anything was done.

    Raises:
        MergeError: see merge.engine.run.
    """
    text = merge.text(base, inputs)
    if not again and (out / MANIFEST).is_file() and read_manifest(out).get("recipe") == text:
        settle(out)
        return False
    from merge.engine.run import run_plan

    run_plan(build_plan(resolve(draft_of(merge.recipe(base, inputs), text, None))), out, force=True, **options)
    return True
