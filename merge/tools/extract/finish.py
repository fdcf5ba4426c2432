"""Finishes an extraction: joins the parts to an adapter with config, card and manifest, and puts OUT in place."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from merge.errors import UsageError
from merge.jsontext import parse_json
from merge.output.directory import sync_directory, write_durably
from merge.output.manifest import MANIFEST
from merge.planning.inputs import Input
from merge.statistics.parts import Parts
from merge.tools.extract.write import CONFIG, WEIGHTS, card_text, config_text, manifest_of

if TYPE_CHECKING:
    from merge.tools.extract.run import Work


@dataclass(frozen=True)
class Summary:
    """The result of an extraction. Errors are relative Frobenius norms, ‖D - B·A‖ / ‖D‖.

    Attributes:
        modules: {module, parameter, shape, rank, error, share}; share: of the squared length of all differences;
            parameter: it is the name of a parameter, as in target_parameters.
        others: {tensor, change, share, saved} of differing tensors without factors; change: ‖D‖ / ‖base‖.
        unchanged: how many tensors are the same in both models.
        error: over the modules with factors; total_error: over everything, with what was left out.
        parameters: numbers in the adapter.
    """

    out: str
    modules: tuple[dict[str, Any], ...]
    others: tuple[dict[str, Any], ...]
    unchanged: int
    error: float
    total_error: float
    parameters: int
    bytes_written: int
    resumed: int
    seconds: float
    notes: tuple[str, ...]


def finish(
    out: Path,
    parts: Parts,
    work: Work,
    saved: Mapping[str, str],
    models: tuple[Input, Input],
    asked: Mapping[str, object],
    notes: tuple[str, ...],
    began: float,
) -> Summary:
    """Joins `parts` to OUT.

    Args:
        saved: tensors kept whole -> the module they belong to.
        models: the base, and the fine-tune.
        asked: the settings, for the manifest.
        began: time.monotonic() of the call.

    Raises:
        UsageError: no matrix differs.
    """
    base, tuned = models
    if not work.names:
        parts.work.clear()
        raise UsageError(
            f"{tuned.ref.text} equals {base.ref.text} in every matrix that an adapter could change; there is nothing "
            "to extract. See --embeddings and --save-modules."
        )
    result = parts.result
    result.mkdir()
    parts.join(work.names, {"format": "pt"}, result / WEIGHTS)
    total = sum(each["energy"] for each in work.results) + sum(squares for _, squares, _ in work.others)
    modules, others = _shares(work, saved, total)
    lost = sum(each["lost"] for each in work.results)
    energy = sum(each["energy"] for each in work.results)
    left_out = sum(squares for pair, squares, _ in work.others if pair.name not in saved)
    summary = Summary(
        out=str(out),
        modules=modules,
        others=others,
        unchanged=sum(not each["rank"] for each in work.results) + sum(not squares for _, squares, _ in work.others),
        error=_root(lost, energy),
        total_error=_root(lost + left_out, total),
        parameters=0,
        bytes_written=os.path.getsize(result / WEIGHTS),
        resumed=work.resumed,
        seconds=0.0,
        notes=(*notes, *work.selection.notes, *_tie_notes(work)),
    )
    files = _small_files(out, work, saved, base, tuned, summary)
    settings = {"model": tuned.ref.text, "base": base.ref.text, **asked}
    manifest = manifest_of(result, files, settings, [*modules, *others])
    for name, data in {**files, MANIFEST: manifest}.items():
        write_durably(result / name, data)
    sync_directory(result)
    parameters = sum(math.prod(tensor["shape"]) for tensor in parse_json(manifest)["tensors"].values())
    summary = dataclasses.replace(summary, parameters=parameters, seconds=round(time.monotonic() - began, 3))
    parts.work.complete(dataclasses.asdict(summary))
    return summary


def _shares(
    work: Work, saved: Mapping[str, str], total: float
) -> tuple[tuple[dict[str, object], ...], tuple[dict[str, object], ...]]:
    modules = tuple(
        {
            "module": each["module"],
            "parameter": each["parameter"],
            "shape": each["shape"],
            "rank": each["rank"],
            "error": _root(each["lost"], each["energy"]),
            "share": each["energy"] / total,
        }
        for each in work.results
        if each["rank"]
    )
    others = tuple(
        {"tensor": pair.name, "change": _root(squares, size), "share": squares / total, "saved": pair.name in saved}
        for pair, squares, size in work.others
        if squares
    )
    return modules, others


def _small_files(
    out: Path, work: Work, saved: Mapping[str, str], base: Input, tuned: Input, summary: Summary
) -> dict[str, bytes]:
    parameters = {each["module"]: each["rank"] for each in summary.modules if each["parameter"]}
    ranks = {each["module"]: each["rank"] for each in summary.modules}
    architectures = base.config.get("architectures") or []
    with_factors = work.with_factors
    biases = any(module in with_factors for module in saved.values())
    whole = list(dict.fromkeys(module for module in saved.values() if module not in with_factors))
    config = config_text(
        base=base.ref.path if base.checkpoint.revision else base.ref.text,
        revision=base.ref.revision,
        causal=any(str(name).endswith("ForCausalLM") for name in architectures),
        ranks=ranks,
        parameters=list(parameters),
        others=[name for name in work.selection.modules if name not in ranks],
        modules_to_save=whole,
        biases=biases,
        fan_in_fan_out=work.selection.fan_in_fan_out,
    )
    if any(name in work.selection.ties.values() for name in saved):
        config = json.dumps(parse_json(config) | {"ensure_weight_tying": True}, indent=2) + "\n"
    is_hub = base.checkpoint.revision is not None
    table = [
        f"{len(ranks)} modules, ranks {min(ranks.values(), default=0)} to {max(ranks.values(), default=0)}; relative "
        f"error {summary.error:.3g} over them, {summary.total_error:.3g} over all tensors that differ.",
        "",
        f"`{MANIFEST}` has the error of each module and the digests; `merge verify` checks them.",
    ]
    name = Path(os.path.abspath(out)).name
    card = card_text(name, base.ref.text, is_hub, tuned.ref.text, table)
    return {CONFIG: config.encode(), "README.md": card.encode("utf-8", "backslashreplace")}


def _tie_notes(work: Work) -> list[str]:
    sources = [name.removesuffix(".weight") for name in work.selection.ties.values()]
    if any(each["module"] in sources and each["rank"] for each in work.results):
        return ["the head is tied to the embedding: fold the adapter to change both; PEFT changes only one"]
    return []


def _root(part: float, whole: float) -> float:
    return float((part / whole) ** 0.5) if whole else 0.0
