"""Perplexity of a causal language model on a text: exp of the mean negative log-likelihood of a token."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from merge.errors import UsageError
from merge.statistics.data import make_batches, read_texts

SAMPLE = (
    "A library lends books to everyone who lives in the town. Each reader may take ten of them home and keep them for "
    "four weeks. A book that nobody else has asked for can be kept for longer, and one that many people wait for "
    "has to come back in time.",
    "Water boils at a lower temperature in the mountains than at the sea, because the air presses on it less. That is "
    "why potatoes take longer to cook there, even though the pot bubbles just as hard.",
    "To sort a list of numbers, split it into two halves, sort each of them in the same way, and then merge the "
    "results: take the smaller of the two first numbers again and again until both halves are empty.",
    "The ship left the harbour before sunrise. By noon the coast was a thin grey line behind it, and the captain "
    "ordered the crew to set all sails, since the wind came from the west and the sky was clear.",
)


def perplexity(model: str, data: Path | None, max_tokens: int = 4096, length: int = 512) -> float:
    """The model at a path, in memory as its config says, on a file of texts or on SAMPLE.

    Raises:
        UsageError: there is nothing to predict in the data, or a package that loads this format is missing.
        CheckpointError: transformers cannot load the model.
        NumbersError: it gives NaN.
    """
    from merge.tools.loaded import load
    from merge.tools.perplexity import of_network

    texts = list(SAMPLE) if data is None else read_texts(data)
    try:
        loaded = load(model)
    except UsageError as error:
        raise UsageError(f"{error} Install it, or give --no-perplexity.") from error
    network = loaded.network
    length = min(length, getattr(network.config.get_text_config(), "max_position_embeddings", None) or length)
    batches = make_batches(loaded.tokenizer, texts, max_tokens, length, 1, 0)
    return of_network(network, [np.array(batch) for batch in batches.all], model).perplexity.value
