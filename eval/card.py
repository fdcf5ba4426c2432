"""Writes an evaluation into a model card: a marked section with tables, and the Hub's model-index in the header.

The section replaces one of an earlier evaluation; all other text stays as it is, to the byte.
"""

from __future__ import annotations

import json
from pathlib import Path

from eval.compare import Comparison
from eval.results import ModelScores
from eval.tables import as_markdown
from merge.errors import OutputError, UsageError
from merge.output.card import with_evaluation
from merge.output.directory import write_whole


def write_card(directory: Path, comparison: Comparison) -> Path:
    """Puts the comparison into `directory`/README.md, which is made if there is none.

    Raises:
        UsageError: no such directory.
        OutputError: a card that cannot be read as text or written.
    """
    if not directory.is_dir():
        raise UsageError(f"--card {directory}: there is no such directory.")
    path = directory / "README.md"
    try:
        # newline="": line ends stay as they are.
        with path.open(encoding="utf-8", newline="") as file:
            before = file.read()
    except FileNotFoundError:
        before = f"---\nlibrary_name: transformers\n---\n\n# {directory.resolve().name}\n"
    except (OSError, UnicodeDecodeError) as error:
        raise OutputError(f"{path}: cannot be read as UTF-8 text ({error}).") from None
    model = _its_model(directory, comparison)
    text = "\n## Evaluation\n\n" + _how(comparison) + "\n\n" + as_markdown(comparison)
    after = with_evaluation(before, model_index(model, comparison) if model else "", text)
    try:
        write_whole(path, after.encode())
    except OSError as error:
        raise OutputError(f"{path}: cannot be written ({error.strerror}).") from error
    return path


def _its_model(directory: Path, comparison: Comparison) -> ModelScores | None:
    """The model of the card: the one judged in this directory, else the only merge."""
    for model in comparison.results.models:
        if model.path is not None and Path(model.path) == directory.resolve():
            return model
    return comparison.merges[0].model if len(comparison.merges) == 1 else None


def _how(comparison: Comparison) -> str:
    results = comparison.results
    versions = results.versions
    text = (
        f"Made with `merge compare` (lm-eval {versions.get('lm_eval', '?')}, {results.settings.get('backend', 'hf')})"
    )
    said = [
        f"{key.replace('_', '-')} {results.settings[key]}"
        for key in ("limit", "num_fewshot")
        if results.settings.get(key)
    ]
    if results.settings.get("chat_template"):
        said.append("with the chat template")
    return text + (f"; {', '.join(said)}" if said else "") + ". All models answered the same items."


def model_index(model: ModelScores, comparison: Comparison) -> str:
    """The Hub's evaluation metadata: https://huggingface.co/docs/hub/model-cards. JSON's strings are YAML's."""
    lines = ["model-index:", f"- name: {json.dumps(model.name)}", "  results:"]
    for name in comparison.results.tasks:
        task = model.tasks[name]
        metric = task.metric.partition(",")[0]
        shown = f"{name} (sample, no leaderboard score)" if comparison.results.is_sample(name) else name
        lines += [
            "  - task:",
            "      type: text-generation",
            "    dataset:",
            f"      name: {json.dumps(shown)}",
            f"      type: {json.dumps(name)}",
            "    metrics:",
            f"    - type: {json.dumps(metric)}",
            f"      value: {task.value!r}",
            f"      name: {json.dumps(metric)}",
        ]
    return "\n".join(lines) + "\n"
