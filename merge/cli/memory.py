"""merge memory: Estimate the memory that a model takes to run, train or merge."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import TYPE_CHECKING

import click

from merge.cli.options import json_flag, trust_option
from merge.show.terminal import console, printable, show_table

if TYPE_CHECKING:
    from finetune.keys import Config
    from merge.tools.memory import Estimate, Request

_DTYPES = ("float32", "bfloat16", "float16", "float8", "int8", "int4", "nf4")


@click.command(
    "memory",
    epilog="""\b
Examples:
  merge memory 13B                               weights x 1.2
  merge memory org/model-7b --context 8192 --batch 4
  merge memory 7B --task full                    before activations
  merge memory config.json --task lora --rank 16 --targets q_proj,v_proj --context 1024 --checkpointing
  merge memory org/model-7b --task qlora --optimizer adam8bit
  merge memory finetune.yaml                     what merge finetune takes with this config""",
)
@click.argument("model")
@click.option(
    "--task",
    type=click.Choice(["inference", "full", "lora", "qlora", "merge"]),
    default="inference",
    show_default=True,
    help="What to do with the model.",
)
@click.option(
    "--dtype",
    type=click.Choice(_DTYPES),
    help="Dtype of the weights.  [default: the config's; in training what merge finetune takes]",
)
@click.option(
    "--device",
    type=click.Choice(["cuda", "cpu"]),
    default="cuda",
    show_default=True,
    help="Device; on a GPU, training keeps frozen weights in bfloat16 and uses mixed precision.",
)
@click.option("--context", type=click.IntRange(1), help="Tokens of a sequence.  [default: 2048 or what it takes]")
@click.option("--batch", type=click.IntRange(1), help="Batch size.  [default: 1]")
@click.option(
    "--optimizer",
    type=click.Choice(["adamw", "adam8bit", "sgd", "adafactor", "lion"]),
    default="adamw",
    show_default=True,
)
@click.option("--rank", type=click.IntRange(1), default=8, show_default=True, help="Rank of LoRA's matrices.")
@click.option("--targets", default="all-linear", show_default=True, help="Adapted layers, such as q_proj,v_proj.")
@click.option("--accumulation", is_flag=True, help="Gradients of several batches are added up before a step.")
@click.option("--checkpointing", is_flag=True, help="Gradient checkpointing: activations are computed twice.")
@click.option("--master-weights", is_flag=True, help="Full training in 16 bits with float32 master weights and states.")
@json_flag("Print the estimate as JSON.")
@trust_option
def command(
    model: str,
    task: str,
    dtype: str | None,
    device: str,
    context: int | None,
    batch: int | None,
    optimizer: str,
    rank: int,
    targets: str,
    accumulation: bool,
    checkpointing: bool,
    master_weights: bool,
    as_json: bool,
) -> None:
    """Estimate the memory that MODEL takes: a directory, hub id, config.json, a number of parameters such as
    13B, or a config of merge finetune.

    With a config, activations are those of transformers' own code, counted in one step that allocates nothing. Weights
    are not read.
    """
    from merge.tools.memory import Request, estimate
    from merge.tools.memory_math import fits

    request = Request(
        task=task,
        dtype=dtype,
        device=device,
        context=context,
        batch=batch,
        optimizer=optimizer,
        rank=rank,
        targets=tuple(target.strip() for target in targets.split(",") if target.strip()),
        accumulation=accumulation,
        checkpointing=checkpointing,
        master_weights=master_weights,
    )
    if model.endswith((".yaml", ".yml")):
        model, request = _of_config(model, device)
    found = estimate(model, request)
    cards = fits(found.total)
    if as_json:
        from merge.loading import code_that_ran

        values = dataclasses.asdict(found) | {
            "parts": dict(found.parts),
            "total": found.total,
            "cards": [
                {"gb": size, "usable_gib": round(gib, 2), "names": names, "fits": fit}
                for size, gib, names, fit in cards
            ],
            "trusted_code": code_that_ran(),
        }
        click.echo(json.dumps(values))
        return
    _print(found, cards)


def _of_config(file: str, device: str) -> tuple[str, Request]:
    """Model and settings of a config of merge finetune. Raises UsageError for flags that it sets itself."""
    from finetune.config import load_config
    from merge.errors import UsageError

    context = click.get_current_context()
    given = [
        f"--{name}".replace("_", "-")
        for name in context.params
        if name not in ("model", "device", "as_json")
        and context.get_parameter_source(name) is click.core.ParameterSource.COMMANDLINE
    ]
    if given:
        raise UsageError(f"{', '.join(given)}: set in {file}; change it there.")
    config = load_config(file)
    beside = Path(file).parent / config.model
    model = str(beside) if not Path(config.model).exists() and beside.exists() else config.model
    return model, dataclasses.replace(request_of(config), device=device)


def request_of(config: Config) -> Request:
    """The settings of a config of merge finetune.

    Raises:
        UsageError: a way of training that is not predicted.
    """
    from merge.errors import UsageError
    from merge.tools.memory import Request

    if config.train not in ("full", "lora", "qlora"):
        raise UsageError(f"train: {config.train} is not predicted; full, lora and qlora are.")
    optimizers = {"adamw_8bit": "adam8bit", "paged_adamw_8bit": "adam8bit"}
    return Request(
        task=config.train,
        dtype=None if config.dtype == "auto" else config.dtype,
        context=config.max_length,
        batch=config.batch_size,
        optimizer=optimizers.get(config.optimizer, config.optimizer),
        rank=config.rank,
        targets=config.target_modules or ("all-linear",),
        accumulation=config.gradient_accumulation > 1,
        checkpointing=config.gradient_checkpointing,
        double_quant=config.double_quantization,
    )


def _print(found: Estimate, cards: list[tuple[int, float, str, bool]]) -> None:
    from rich.table import Table

    trained = f", {found.trainable:,} of them trained" if found.trainable else ""
    click.echo(f"{printable(found.model)}: {found.parameters:,} parameters{trained}, {found.dtype}, {found.task}")
    if found.context is not None:
        click.echo(f"{found.batch} x {found.context:,} tokens")
    table = Table(box=None, pad_edge=False)
    table.add_column("part")
    table.add_column("GB", justify="right")
    for part, n_bytes in (*found.parts, ("total", found.total)):
        table.add_row(part, _gb(n_bytes))
    out = console()
    show_table(table, out)
    for note in found.notes:
        click.echo(f"note: {note}")
    if found.task == "merge":
        return
    table = Table(box=None, pad_edge=False)
    for name in ("card", "GB", "usable GiB", "fits"):
        table.add_column(name, justify="right" if "G" in name else "left")
    for size, gib, names, fit in cards:
        table.add_row(names, str(size), f"{gib:.1f}", "yes" if fit else "no")
    show_table(table, out)


def _gb(n_bytes: int) -> str:
    """Three places: 31.200"""
    return f"{n_bytes / 1e9:,.3f}"
