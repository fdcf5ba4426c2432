"""Logits of a causal language model that need not fit into memory, float32.

Every batch of windows passes through one decoder layer before the next one is read (merge/layerwise). In memory: one
layer, the hidden states of all windows (in a file beyond a budget), a block of the head's rows.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from merge.checkpoint import open_checkpoint
from merge.checkpoint.reader import SourceReader
from merge.layerwise import HiddenStates, LayerRunner, open_runner, whole_model
from merge.recipe.references import parse_reference

Batch = npt.NDArray[np.int64]  # (windows, tokens)
Advance = Callable[[float], None]  # the finished share of the work, 0 to 1


class Logits(Protocol):
    """The interface of a model for perplexity.

    Attributes:
        vocabulary: rows of the head.
        in_blocks: whether the cost of `logits` is proportional to the requested rows.
    """

    vocabulary: int
    in_blocks: bool

    def run(self, advance: Advance) -> None:
        """Computes everything before the head, for all batches."""

    def load_rows(self, start: int, stop: int) -> None:
        """Chooses the rows of the head, hence the tokens, that `logits` computes."""

    def logits(self, number: int) -> Any:
        """(windows, tokens, rows) float32 of one batch."""

    def close(self) -> None: ...


def open_logits(
    path: Path, batches: Sequence[Batch], budget: int, max_ram: int | None, say: Callable[[str], None]
) -> Logits:
    """Runs layer by layer if the architecture allows it, else with the whole model in memory and a note.

    Args:
        budget: bytes of hidden states that stay in memory.
        max_ram: see open_runner.

    Raises:
        CheckpointError: a model that cannot be read, or that transformers does not know.
        UsageError: the whole model has to be in memory, and takes more than max_ram.
    """
    checkpoint = open_checkpoint(parse_reference(str(path.absolute())))
    reader = SourceReader(checkpoint.files)
    try:
        runner = open_runner(checkpoint, reader, max_ram, say)
    except BaseException:
        reader.close()
        raise
    if runner is None:
        reader.close()
        return WholeLogits(whole_model(checkpoint.path), batches)
    return StreamedLogits(runner, reader, batches, budget)


class WholeLogits:
    """The same with the whole model in memory."""

    in_blocks = False

    def __init__(self, model: Any, batches: Sequence[Batch]) -> None:
        self._model, self._batches = model, batches
        self._rows = slice(None)
        self.vocabulary = int(model.get_output_embeddings().weight.shape[0])

    def run(self, advance: Advance) -> None:
        advance(1.0)

    def load_rows(self, start: int, stop: int) -> None:
        self._rows = slice(start, stop)

    def logits(self, number: int) -> Any:
        import torch

        with torch.no_grad():
            found = self._model(input_ids=torch.from_numpy(self._batches[number]), use_cache=False).logits
        return found.float()[..., self._rows]

    def close(self) -> None:
        self._model = None


class StreamedLogits:
    """One model, one layer in memory."""

    in_blocks = True

    def __init__(self, runner: LayerRunner, reader: SourceReader, batches: Sequence[Batch], budget: int) -> None:
        import torch

        self.runner, self.vocabulary = runner, runner.vocabulary
        self._reader, self._tokens = reader, [torch.from_numpy(batch) for batch in batches]
        self._hidden = HiddenStates(budget)

    def run(self, advance: Advance) -> None:
        """Hidden states of all batches after the last layer."""
        n_tokens = sum(tokens.numel() for tokens in self._tokens)
        share = 1 / (len(self.runner.layers) + 1)
        for number, tokens in enumerate(self._tokens):
            self._hidden.put(number, self.runner.embed(tokens))
        advance(share)
        for i in range(len(self.runner.layers)):
            with self.runner.layer(i) as run:
                for number, tokens in enumerate(self._tokens):
                    self._hidden.put(number, run(tokens, self._hidden.get(number)))
                    advance(share * tokens.numel() / n_tokens)

    def load_rows(self, start: int, stop: int) -> None:
        self.runner.load_head(start, stop)

    def logits(self, number: int) -> Any:
        return self.runner.finish(self._tokens[number], self._hidden.get(number))

    def close(self) -> None:
        self._reader.close()
        self._hidden.close()
