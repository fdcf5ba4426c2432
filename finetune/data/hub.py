"""Loads data sets of the Hugging Face hub by name, from the network or the cache; needs `datasets`."""

from __future__ import annotations

from finetune.data.files import Row
from merge.checkpoint.network import no_network
from merge.errors import UsageError, first_line


def read_hub(name: str, subset: str | None, split: str | None) -> tuple[list[Row], str]:
    """The rows, and their fingerprint from `datasets`. `split`: by default train.

    Raises:
        UsageError: no such data set, subset or split; `datasets` is not installed; neither a network nor a cache.
    """
    try:
        import datasets
    except ImportError:
        raise UsageError(
            f"data {name}: there is no such file; data sets of the hub need `datasets`: pip install datasets."
        ) from None
    offline = no_network()
    try:
        found = datasets.load_dataset(name, subset, split=split or "train")
    except Exception as error:  # errors of the hub, the network, file formats and the builder have many classes
        why = offline or first_line(error)
        raise UsageError(
            f"data {name}: there is no such file, and the hub's data set cannot be read ({why})."
        ) from None
    rows = [Row(f"{name}:{number}", dict(row)) for number, row in enumerate(found, 1)]
    if not rows:
        raise UsageError(f"data {name}: holds no examples; it is empty.")
    return rows, str(found._fingerprint)
