"""Writes the numbers of training_log.json as TensorBoard events, during training to OUT.partial/tensorboard.

A resumed run starts a new file, with the step from which it replaces earlier values (TensorBoard's SessionLog.START),
so steps that were trained twice are shown once.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.integrations.integration_utils import rewrite_logs

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter


class Events(TrainerCallback):  # type: ignore[misc]  # transformers is untyped here
    """Writes every logged number under transformers' names: train/loss, eval/loss, train/learning_rate and so on.

    `resumed`: the step that the run resumes from; at 0 the events of an earlier attempt are removed.
    """

    def __init__(self, folder: Path, resumed: int) -> None:
        self._folder, self._resumed = folder, resumed
        self._writer: SummaryWriter | None = None

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: object,
    ) -> None:
        if not state.is_world_process_zero:
            return
        if self._writer is None:
            self._writer = self._open()
        for name, value in rewrite_logs(logs or {}).items():
            self._writer.add_scalar(name, value, state.global_step)
        self._writer.flush()  # before the checkpoint of this step, so that no step is missing

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        if self._writer is not None:
            self._writer.close()
            self._writer = None

    def _open(self) -> SummaryWriter:
        from torch.utils.tensorboard import SummaryWriter

        if self._resumed:
            return SummaryWriter(str(self._folder), purge_step=self._resumed + 1)
        shutil.rmtree(self._folder, ignore_errors=True)
        return SummaryWriter(str(self._folder))
