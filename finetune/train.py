"""finetune(config): trains a config's model and writes a directory that recipes can use. Read this file first.

    samples, base (config.json, tokenizer), examples        data/, models.py: all checked, nothing written
    model, with what is to be trained; transformers' loop   trainables.py, trainer.py
    OUT.partial: checkpoints, result/ -> OUT                output.py, result.py

Killed and started again, it resumes from the last complete checkpoint; on CPU, with the same number of threads,
the result is identical bit for bit.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from finetune.arguments import arguments
from finetune.config import keeps_best
from finetune.distributed import check_launch, is_first, known_to_all
from finetune.models import load_model, local_device, pick_device
from finetune.output import TrainingDirectory
from finetune.prepare import Prepared
from finetune.record import TENSORBOARD
from finetune.result import save_result, summarise_losses, summarise_metrics, write_records
from finetune.sources import check_sources, source_digests, weight_digests
from finetune.trainables import TRAINABLES, count_parameters, make_trainable
from merge.codec import decode
from merge.engine.memory import peak_resident
from merge.loading.libraries import quiet_libraries
from merge.output.directory import check_out
from merge.processors import openmp_threads

if TYPE_CHECKING:
    from torch.nn import Module
    from transformers import TrainingArguments

    from finetune.trainer import Tuner

Progress = Callable[[int, int, dict[str, float]], None]
Say = Callable[[str], None]


@dataclass(frozen=True)
class TrainingReport:
    """What came out. Losses in nats a token (or example, or pair: see objectives/); `metrics`: figures of the
    validation set before and after, by name; `tokens`: read by this process since it started or resumed."""

    out: str
    steps: int
    resumed_from: int
    losses: dict[str, float | None]
    metrics: dict[str, tuple[float, float]]
    trained_parameters: int
    parameters: int
    tokens: int
    seconds: float
    peak_memory: int
    notes: tuple[str, ...]


def finetune(
    prepared: Prepared,
    *,
    device: str | None = None,
    threads: int | None = None,
    force: bool = False,
    say: Say = lambda text: None,
    progress: Progress = lambda step, steps, logs: None,
) -> TrainingReport:
    """Trains and writes config.out.

    Args:
        device: cpu or cuda; by default a GPU if there is one.
        threads: of torch.
        force: replace an existing result, discard other unfinished work.
        say: called with a line to tell the user.
        progress: called after each step, and with what is logged.

    Raises:
        MergeError: as prepare(); and what only the weights, the disk or the training itself show.
    """
    with quiet_libraries():
        return _finetune(prepared, device, threads, force, say, progress)


def _finetune(
    prepared: Prepared, device: str | None, threads: int | None, force: bool, say: Say, progress: Progress
) -> TrainingReport:
    import torch
    from transformers import set_seed

    config, base, data = prepared.config, prepared.base, prepared.data
    out = Path(config.out)
    first = is_first()
    if first:
        check_out(out, force, prepared.places)
    device = pick_device(config, device)
    check_launch(config, device)
    torch.set_num_threads(threads or openmp_threads())  # torch counts the machine's, whatever a container may use
    digests = weight_digests(base.path)
    objective = prepared.objective
    kept = objective.record()
    weights = {f"{config.model}/{name}": digest for name, digest in digests.items()}
    sources = source_digests(prepared.sources, known=data.files | weights)
    identity = {"config": dataclasses.asdict(config), "sources": sources, **kept}
    set_seed(config.seed)
    model = load_model(base, config, objective.model_class, device, objective.loading())
    model = make_trainable(model, config, objective.task_type, list(prepared.new_ids))
    trained, total = count_parameters(model)
    say(f"{config.train}: trains {trained:,} of {total:,} parameters ({trained / total:.2%})")
    if model.new_parameters:
        say(f"{len(model.new_parameters)} parameters are not in the base and start at random: {_few(model)}")
    _check_model(model, prepared, device, out)
    objective.begin(model, data, config, device)
    check_sources(prepared.sources)  # what was loaded is what the digests are of
    with TrainingDirectory(out, identity, force, first, prepared.places) as directory:
        args = arguments(prepared, device, directory.partial)
        finished = known_to_all(args, directory.finished)
        if finished is not None:
            return decode(finished, TrainingReport)
        trainer, resumed, seconds = _train(model, prepared, sources, directory, args, say, progress)
        losses = summarise_losses(trainer.state.log_history, keeps_best(config))
        metrics = summarise_metrics(trainer.state.log_history, keeps_best(config))
        figures = {
            "trained_parameters": trained,
            "parameters": total,
            "steps": trainer.state.global_step,
            "best_step": trainer.state.best_global_step if keeps_best(config) else None,
            "losses": losses,
            "metrics": metrics,
            **kept,
        }
        notes = list(prepared.notes)
        save_result(trainer, prepared, directory)
        check_sources(prepared.sources, sources)
        if first:
            note = write_records(trainer, prepared, directory, digests, figures)
            notes += [note] if note else []
        report = TrainingReport(
            str(out),
            trainer.state.global_step,
            resumed,
            losses,
            metrics,
            trained,
            total,
            trainer.tokens,
            seconds,
            peak_resident(),
            tuple(notes),
        )
        if first:
            directory.complete(dataclasses.asdict(report))
    return report


def _check_model(model: Module, prepared: Prepared, device: str, out: Path) -> None:
    from finetune.checks import check_packing, check_space

    check_space(model, out, TRAINABLES[prepared.config.train].adapter)
    if prepared.config.packing:
        model.to(local_device(device))
        pad = prepared.base.tokenizer.pad_token_id
        check_packing(model, prepared.data, prepared.objective, pad)


def _few(model: Module) -> str:
    names = model.new_parameters
    return ", ".join(names[:4]) + (" ..." if len(names) > 4 else "")


def _train(
    model: Module,
    prepared: Prepared,
    sources: Mapping[str, str],
    directory: TrainingDirectory,
    args: TrainingArguments,
    say: Say,
    progress: Progress,
) -> tuple[Tuner, int, float]:
    """(trainer, the step it resumed from, seconds). sources: digests of what is read, by name."""
    from transformers import EarlyStoppingCallback

    from finetune.trainer import Tuner, last_checkpoint, on_checkpoint

    config, data = prepared.config, prepared.data
    args.distributed_state.wait_for_everyone()  # until the first process has cleared OUT.partial
    checkpoint = last_checkpoint(directory.partial, remove=directory.first)
    args.eval_on_start = data.validation is not None and checkpoint is None
    args.restore_callback_states_from_checkpoint = checkpoint is not None
    trainer = Tuner(
        model,
        args,
        prepared.objective,
        data.train,
        data.validation,
        prepared.base.tokenizer.pad_token_id,
        progress,
    )
    trainer.add_callback(on_checkpoint(lambda: check_sources(prepared.sources, sources)))
    if config.early_stopping is not None:
        trainer.add_callback(EarlyStoppingCallback(config.early_stopping))
    if config.scheduler != "constant" and args.get_warmup_steps(args.max_steps) >= args.max_steps:
        say(f"note: warm-up takes all {args.max_steps:,} steps, so the learning rate is never reached; see warmup")
    resumed = 0 if checkpoint is None else int(checkpoint.name.rpartition("-")[2])
    if config.tensorboard:
        from finetune.tensorboard import Events

        trainer.add_callback(Events(directory.partial / TENSORBOARD, resumed))
    if resumed:
        say(f"resuming from step {resumed:,}")
    started = time.monotonic()
    trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    return trainer, resumed, time.monotonic() - started
