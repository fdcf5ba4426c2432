"""Config files of merge finetune: one training, and several tasks."""

from __future__ import annotations

import random
from collections.abc import Callable

from fuzz.place import Place
from fuzz.recipes import damaged_yaml

SOUND = (
    "model: a\ndata: train.jsonl\nout: tuned\nlearning_rate: 2e-4\nepochs: 2\nrank: 8\nvalidation: 0.05\n",
    "model: a\ndata: [{path: a.jsonl, weight: 1, format: text}, {path: b.jsonl, weight: 2}]\nout: tuned\ntrain: full\n"
    'prompt: "Q: {question}"\ncompletion: "{answer}"\nmax_steps: 10\nseed: 3\nscheduler: linear\nearly_stopping: 2\n'
    "validation: [{path: v.jsonl}]\n",
    "model: a\nout: tuned\nstrategy: [simultaneous, parallel]\nvalidation: 0.1\n"
    "tasks: {sort: {data: s.jsonl, weight: 2}, add: {data: a.jsonl, weight: 1}}\nworkers: 2\n"
    "merge: [{merge_method: ties, parameters: {density: 0.5}}, {name: sum, merge_method: task_arithmetic}]\n",
)


class Format:
    def set_up(self, place: Place) -> Callable[[], object]:
        place.put("c.yaml", SOUND[0])
        return read

    def damage(self, place: Place, dice: random.Random) -> Callable[[], object]:
        place.put("c.yaml", damaged_yaml(dice.choice(SOUND), dice))
        return read


def read() -> None:
    """As the command reads it, before any model is looked for."""
    from finetune.before import is_task_file
    from finetune.config import load_config
    from finetune.strategies.config import load_tasks

    if is_task_file("c.yaml"):
        load_tasks("c.yaml")
    else:
        load_config("c.yaml")
