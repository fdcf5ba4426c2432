"""transformers' Trainer with our losses and evaluation, and checkpoints that contain only trained parameters.

What differs from Trainer, and why:
* The loss of a step is the sum over its tokens' weights, divided by the sum of the weights, over all batches and
  processes of the step: gradient accumulation changes nothing. Evaluation is the exact mean over the validation set.
* A loss that is not finite stops the run before the optimiser has used it, and the message names the examples.
* A checkpoint is the trained parameters, by name, bit for bit: PEFT's own files lack the encoders of prompts. It counts
  once its marker is there, so a kill while it is written costs one checkpoint, not the run.
"""

from __future__ import annotations

import functools
import itertools
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from finetune.data.pack import Batch, Rows
from finetune.objectives.base import Objective
from merge.errors import NumbersError, OutputError
from merge.output.directory import sync

PARAMETERS = "trainable.safetensors"
MARKER = "complete"


class Tuner(Trainer):  # type: ignore[misc]  # transformers is untyped here
    """Trains `objective` on rows. `progress`: called with (step, steps, what was logged)."""

    loss_is_scaled_for_ga = True  # divided by the weights of the whole step

    def __init__(
        self,
        model: nn.Module,
        args: TrainingArguments,
        objective: Objective,
        train: Rows,
        validation: Rows | None,
        pad: int,
        progress: Callable[[int, int, dict[str, float]], None],
    ) -> None:
        collate = functools.partial(objective.collate, pad=pad)
        super().__init__(
            model=model,
            args=args,
            train_dataset=train,
            eval_dataset=validation,
            data_collator=collate,
            callbacks=[_Keeper(), _Progress(progress)],
        )
        self.objective = objective
        self.tokens = 0  # read by this process
        self.remove_callback(PrinterCallback)

    def get_batch_samples(
        self, epoch_iterator: Iterator[Batch], num_batches: int, device: str
    ) -> tuple[list[Batch], Tensor]:
        """The batches of one optimiser step, and the sum of their weights over all processes."""
        batches = list(itertools.islice(epoch_iterator, num_batches))
        self.tokens += sum(len(self.train_dataset.examples[i]) for batch in batches for i in batch["examples"])
        if batches and self.args.world_size > 1 and self.accelerator.gradient_state.end_of_dataloader:
            batches[-1]["counted"] = self._counted()
        weight = sum((self.objective.weights(b)[: b.get("counted")].sum() for b in batches), torch.zeros(()))
        if self.args.world_size > 1:
            weight = self.accelerator.gather(weight.to(device)).sum()
        return batches, weight

    def _counted(self) -> int | None:
        """Rows of this process in the last batches of an epoch that are not repeated: accelerate makes all batches
        full, with rows from the epoch's start behind its last ones, which would count twice."""
        each = self.args.per_device_train_batch_size
        rest = len(self.train_dataset) % (each * self.args.world_size)
        return max(rest - self.args.process_index * each, 0) if rest else None

    def compute_loss(
        self, model: nn.Module, inputs: Batch, return_outputs: bool = False, num_items_in_batch: Tensor | None = None
    ) -> Tensor:
        assert num_items_in_batch is not None
        losses = self.objective.loss(model, inputs)[: inputs.get("counted")]
        if not bool(torch.isfinite(losses).all()):
            self._stop(losses.detach(), inputs["examples"])
        # Gradients are averaged over processes: each gives its part of the sum, times their number.
        return losses.sum() * self.args.world_size / num_items_in_batch.to(losses.device)

    def _stop(self, losses: Tensor, examples: list[int]) -> None:
        step = self.state.global_step + 1
        for name, parameter in self.model.named_parameters():
            if parameter.requires_grad and not bool(torch.isfinite(parameter).all()):
                raise NumbersError(
                    f"step {step}: the loss is not finite, because {name} no longer is: an update before was too "
                    "large. Set a lower learning_rate, max_grad_norm: 1, or precision: fp32, and start with --force."
                )
        bad = [row for row, loss in enumerate(losses) if not bool(torch.isfinite(loss))]
        rows = len(losses)
        named = examples if len(examples) != rows else [examples[row] for row in bad]  # packed: any of them
        places = ", ".join(self.train_dataset.examples[i].place for i in named[:8])
        raise NumbersError(
            f"step {step}: the loss is {losses[bad[0]].item()} for data {places}{' ...' if len(named) > 8 else ''}. "
            "Nothing was updated by it. Remove the example, or set a lower learning_rate or precision: fp32."
        )

    def evaluate(
        self, eval_dataset: Rows | None = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Mean loss over the weights of the whole validation set, and of each task in it."""
        self.model.eval()
        model = self.model_wrapped if self.is_in_train else self.model
        parts = []
        for batch in self.get_eval_dataloader(eval_dataset):
            batch = self._prepare_inputs(batch)
            with torch.no_grad():
                losses, columns = self.objective.measure(model, batch)
            weights = self.objective.weights(batch)
            examples = torch.tensor(batch["examples"], device=losses.device).double()  # not exact in float32
            sums = torch.stack([losses.double(), weights.double(), examples], 1)
            table = torch.cat([sums, columns.double()], 1)
            parts.append(self.accelerator.gather_for_metrics(table).cpu())
        rows = self.eval_dataset if eval_dataset is None else eval_dataset
        table = torch.cat(parts)
        metrics = _means(table[:, :3], rows, metric_key_prefix)
        examples = [rows.examples[int(number)] for number in table[:, 2]]
        more = self.objective.metrics(table[:, 3:], examples)
        metrics |= {f"{metric_key_prefix}_{name}": value for name, value in more.items()}
        self.log(metrics)
        self.control: TrainerControl = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def floating_point_ops(self, inputs: Batch) -> int:
        return 0  # unused, and counting parameters at every step takes time

    # Checkpoints. Parameters that are sharded over processes go the library's way, beside the optimizer's states.

    @property
    def sharded(self) -> bool:
        return bool(self.is_fsdp_enabled or self.is_deepspeed_enabled)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        if not self.sharded:
            super().save_model(output_dir, _internal_call)
        elif self.args.should_save:  # the trainer takes a checkpoint for the best only if its folder is there
            Path(output_dir or self.args.output_dir).mkdir(parents=True, exist_ok=True)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Tensor] | None = None) -> None:
        if not self.args.should_save:
            return
        folder = Path(output_dir or self.args.output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        model = self.accelerator.unwrap_model(self.model)
        parameters = {name: value for name, value in model.named_parameters() if value.requires_grad}
        save_file({name: value.detach().cpu().contiguous() for name, value in parameters.items()}, folder / PARAMETERS)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        if self.sharded:
            super()._load_from_checkpoint(resume_from_checkpoint, model)
            return
        saved = load_file(Path(resume_from_checkpoint) / PARAMETERS)
        own = {name: value for name, value in self.model.named_parameters() if value.requires_grad}
        if saved.keys() != own.keys():
            raise OutputError(f"{resume_from_checkpoint}: holds other parameters; use --force to start over.")
        with torch.no_grad():
            for name, value in own.items():
                value.copy_(saved[name])

    def _load_best_model(self) -> None:
        if self.sharded:
            super()._load_best_model()
            return
        self._load_from_checkpoint(self.state.best_model_checkpoint)


def last_checkpoint(folder: Path, remove: bool) -> Path | None:
    """The newest complete checkpoint. `remove`: delete incomplete ones, which a killed run leaves."""
    found = sorted(folder.glob("checkpoint-*"), key=lambda path: int(path.name.rpartition("-")[2]))
    for path in found:
        if remove and not (path / MARKER).exists():
            shutil.rmtree(path)
    whole = [path for path in found if (path / MARKER).exists()]
    return whole[-1] if whole else None


def _means(table: Tensor, rows: Rows, prefix: str) -> dict[str, float]:
    """table (example, [loss, weight, number]) float64 -> means in nats a token."""
    losses, weights, numbers = table.T
    metrics = {f"{prefix}_loss": float(losses.sum() / weights.sum())}
    tasks = [rows.examples[int(number)].task for number in numbers]
    for task in sorted({task for task in tasks if task is not None}):
        mask = torch.tensor([one == task for one in tasks])
        metrics[f"{prefix}_loss_{task}"] = float(losses[mask].sum() / weights[mask].sum())
    return metrics


class _Keeper(TrainerCallback):  # type: ignore[misc]
    """Marks a checkpoint complete, and then removes those that are neither the newest nor the best."""

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object) -> None:
        args.distributed_state.wait_for_everyone()  # each process writes its random state, and its shards
        if not state.is_world_process_zero:
            return
        newest = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        for file in newest.rglob("*"):
            if file.is_file():
                sync(file)
        (newest / MARKER).touch()
        sync(newest / MARKER)
        keep = {newest.name, Path(state.best_model_checkpoint or newest).name}
        for path in Path(args.output_dir).glob("checkpoint-*"):
            if path.name not in keep:
                shutil.rmtree(path)


def on_checkpoint(call: Callable[[], None]) -> TrainerCallback:
    """Calls it when a checkpoint is complete."""
    callback = TrainerCallback()
    callback.on_save = lambda *args, **keywords: call()
    return callback


class _Progress(TrainerCallback):  # type: ignore[misc]
    def __init__(self, progress: Callable[[int, int, dict[str, float]], None]) -> None:
        self._progress = progress

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        # A logged loss is the mean since the log before. One with each checkpoint: a resumed run logs the same means.
        control.should_log |= control.should_save
        if state.is_world_process_zero:
            self._progress(state.global_step, state.max_steps, {})

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: object,
    ) -> None:
        if state.is_world_process_zero:
            self._progress(state.global_step, state.max_steps, dict(logs or {}))
