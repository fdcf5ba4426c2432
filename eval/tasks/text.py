"""The loss on a text as a task, in bits per byte, which do not depend on the tokenizer."""

from __future__ import annotations

from pathlib import Path

import xxhash

from eval.tasks.task import Task, TaskItems
from merge.errors import UsageError
from merge.statistics.data import read_texts


def text_task(path: Path) -> Task:
    """Each line of a text, or the "text" of each line of a .jsonl file, is an item.

    Raises:
        UsageError: a file that cannot be read, or without text.
    """
    texts = [text for text in read_texts(path) if text.strip()]
    if not texts:
        raise UsageError(f"--data {path}: holds no text.")
    joined = "\0".join(texts).encode("utf-8", "surrogatepass")
    config: dict[str, object] = {
        "task": path.stem,
        "custom_dataset": TaskItems(lambda: [{"text": text} for text in texts]),
        "test_split": "test",
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "text",
        "metric_list": [
            {"metric": metric, "aggregation": aggregation, "higher_is_better": False}
            for metric, aggregation in (("bits_per_byte", "bits_per_byte"), ("byte_perplexity", "weighted_perplexity"))
        ],
        "metadata": {"version": xxhash.xxh3_64_hexdigest(joined)},
    }
    return Task(path.stem, config, "bits_per_byte")
