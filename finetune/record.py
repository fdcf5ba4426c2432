"""Writes the records beside the weights: finetune_manifest.json, the log, the loss curve and the model card."""

from __future__ import annotations

import dataclasses
import json
import platform
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finetune.data import Data
from finetune.keys import Config
from finetune.models import Base
from merge.checkpoint.files import FINETUNE_RECORD
from merge.loading import code_that_ran
from merge.quoting import counted

if TYPE_CHECKING:
    from finetune.objectives.base import Objective

MANIFEST, LOG, CURVE = FINETUNE_RECORD, "training_log.json", "loss.png"
TENSORBOARD = "tensorboard"  # the folder of its events
FORMAT = 1
_PACKAGES = (
    *("merge-workbench", "torch", "transformers", "peft", "accelerate", "tokenizers", "safetensors"),
    "bitsandbytes",
)


def manifest(
    config: Config, base: Base, data: Data, digests: dict[str, str], figures: dict[str, object]
) -> dict[str, object]:
    """`figures`: parameters, losses, steps, times; `digests`: of the base's weights."""
    return {
        "format": FORMAT,
        "config": dataclasses.asdict(config),
        "objective": data.objective,
        "base": {"model": config.model, "revision": base.revision, "weights_xxh3_128": digests},
        "data": {
            "files_sha256": data.files,
            "max_length": data.max_length,
            **{part: dataclasses.asdict(lengths) for part, lengths in data.lengths.items()},
        },
        **figures,
        **({"trusted_code": code} if (code := code_that_ran()) else {}),
        "python": platform.python_version(),
        "packages": {name: version for name in _PACKAGES if (version := _version(name))},
    }


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def draw_losses(log: list[dict[str, float]], path: Path, unit: str = "a token") -> str | None:
    """Training and validation loss over steps, as PNG; a note if matplotlib is not installed."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return f"no {CURVE}: matplotlib is not installed (pip install 'merge-workbench[finetune]')"
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.add_subplot()
    for key, label in (("loss", "training"), ("eval_loss", "validation")):
        points = [(entry["step"], entry[key]) for entry in log if key in entry]
        if points:
            axes.plot(*zip(*points, strict=True), label=label, marker="o" if len(points) < 40 else None, markersize=3)
    axes.set_xlabel("step")
    axes.set_ylabel(f"loss, nats {unit}")
    if axes.lines:
        axes.legend()
    axes.grid(alpha=0.3)
    figure.savefig(path, format="png", dpi=120)
    return None


def card(config: Config, base: Base, data: Data, objective: Objective, figures: dict[str, Any], adapter: bool) -> str:
    """Markdown with the Hub's metadata. A local base is named by its directory's name."""
    name = config.model if base.revision else Path(base.path).name
    head = ["---", f"library_name: {'peft' if adapter else 'transformers'}", f"pipeline_tag: {objective.pipeline}"]
    if base.revision:
        head += [f"base_model: {json.dumps(config.model.split('@')[0])}"]
    head += ["tags:", "- merge-workbench", f"- {config.train}", "---"]
    losses, metrics = figures["losses"], figures["metrics"]
    columns = [f"| {name.replace('_', ' ')} | {a:.4f} | {b:.4f} |" for name, (a, b) in metrics.items()]
    rows = [f"| {what} | {losses[key]:.4f} |" for key, what in _LOSSES if losses.get(key) is not None]
    return "\n".join(
        [
            *head,
            "",
            f"# {Path(config.out).name}",
            "",
            f"{name}, fine-tuned ({config.train}, {data.objective}) with Merge Workbench: "
            f"{figures['trained_parameters']:,} of {figures['parameters']:,} parameters, "
            f"{counted(figures['steps'], 'step')}, {counted(data.lengths['train'].examples, 'example')}.",
            "",
            *([f"| loss, nats {objective.unit} | |", "|---|---:|", *rows, ""] if rows else []),
            *(["| validation | before | after |", "|---|---:|---:|", *columns, ""] if columns else []),
            "```yaml",
            as_yaml(dataclasses.replace(config, model=name, out=Path(config.out).name)).rstrip(),
            "```",
            "",
            f"`{MANIFEST}` has the digests of the data and of the base, and all versions; `{LOG}` every logged loss.",
            "",
        ]
    )


def as_yaml(config: Config) -> str:
    """A config file for this config, with the keys that differ from the defaults."""
    import yaml

    default = Config()
    kept = {
        key: value
        for key, value in dataclasses.asdict(config).items()
        if key == "train" or getattr(default, key) != getattr(config, key)
    }
    for key in ("data", "validation"):
        if isinstance(kept.get(key), (list, tuple)):
            kept[key] = [{name: value for name, value in source.items() if value is not None} for source in kept[key]]
    plain = json.loads(json.dumps(kept))  # tuples -> lists
    return yaml.safe_dump(plain, sort_keys=False, allow_unicode=True)


_LOSSES = (
    ("validation_before", "validation, before"),
    ("validation", "validation, after"),
    ("train_first", "training, first logged"),
    ("train_last", "training, last logged"),
)
