"""Logits of a causal language model that need not fit into memory, float32, one decoder layer at a time.

Every batch of windows passes through one layer before the next layer is read. In memory: one layer, the hidden states
of all windows (in a file beyond a budget), the embedding rows of one batch, a block of the head's rows. Numbers are
those of transformers' own modules: a layer is run by the model's forward with the other layers switched off, so that
masks and rotary embeddings are the model's.
"""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from merge.architecture import Stack, find_stacks, main_stack
from merge.checkpoint import open_checkpoint
from merge.checkpoint.reader import SourceReader
from merge.errors import OutputError
from merge.recipe.references import parse_reference
from merge.statistics.models import Loader, empty_model_of, obstacle, switched_off, whole_model

Batch = npt.NDArray[np.int64]  # (windows, tokens)
Advance = Callable[[float], None]  # the share of the work that is done now, of 1


class Logits(Protocol):
    """What a perplexity needs of a model.

    Attributes:
        vocabulary: rows of the head.
        in_blocks: whether `logits` costs in proportion to the rows that are asked for.
        note: what a user should know of how the model is run; or None.
    """

    vocabulary: int
    in_blocks: bool
    note: str | None

    def run(self, advance: Advance) -> None:
        """Does what comes before the head, for all batches."""

    def load_rows(self, start: int, stop: int) -> None:
        """Chooses the rows of the head, hence the tokens, that `logits` is about."""

    def logits(self, number: int) -> Any:
        """(windows, tokens, rows) float32 of one batch."""

    def close(self) -> None: ...


def open_logits(path: Path, batches: Sequence[Batch], budget: int) -> Logits:
    """Layer by layer where the architecture allows it, else with the whole model in memory, and says so.

    Args:
        budget: bytes of hidden states that stay in memory.

    Raises:
        CheckpointError: a model that cannot be read or that transformers does not know.
    """
    checkpoint = open_checkpoint(parse_reference(str(path.absolute())))
    model = empty_model_of(checkpoint)
    reader = SourceReader(checkpoint.files)
    loader = Loader(model, checkpoint, reader)
    stack = main_stack(find_stacks(checkpoint.tensors, checkpoint.config), checkpoint.config)
    reason = obstacle(model, loader) if stack is not None else "it has no stack of layers"
    if stack is None or reason is not None:
        reader.close()
        return WholeLogits(whole_model(checkpoint.path), batches, f"{path}: the whole model is in memory: {reason}.")
    return StreamedLogits(model, stack, loader, reader, batches, budget)


class WholeLogits:
    """The same from a model in memory."""

    in_blocks = False

    def __init__(self, model: Any, batches: Sequence[Batch], note: str | None = None) -> None:
        self._model, self._batches, self.note = model, batches, note
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

    def __init__(
        self, model: Any, stack: Stack, loader: Loader, reader: SourceReader, batches: Sequence[Batch], budget: int
    ) -> None:
        self._model, self._stack, self._loader, self._reader = model, stack, loader, reader
        self._batches = batches
        self.note: str | None = None
        self._layers = list(model.get_submodule(stack.prefix.rstrip(".")))
        self._embedding, self._head = model.get_input_embeddings(), model.get_output_embeddings()
        self._embedding_name = _name_of(model, self._embedding) + ".weight"
        tied = self._head.weight is self._embedding.weight
        self._head_name = self._embedding_name if tied else _name_of(model, self._head) + ".weight"
        self._bias_name = _name_of(model, self._head) + ".bias" if self._head.bias is not None else None
        self._names = [name for name, _ in model.named_parameters()]
        self.vocabulary = int(self._head.weight.shape[0])
        width = int(self._embedding.weight.shape[1])
        self._hidden = HiddenStates([(*batch.shape, width) for batch in batches], budget)

    def run(self, advance: Advance) -> None:
        """Hidden states of all batches in front of the last norm."""
        import torch

        large = {self._embedding_name, self._head_name, self._bias_name}
        self._loader.load(
            [name for name in self._names if self._stack.layer(name) is None and name not in large]
        )  # norms, mostly
        share = 1 / (len(self._layers) + 1)
        with torch.no_grad():
            self._embed()
            advance(share)
            for i in range(len(self._layers)):
                self._layer(i, lambda part: advance(part * share))

    def _embed(self) -> None:
        """The embedding module with only the rows that a batch needs, in whatever way the model scales them."""
        import torch

        module = self._embedding
        whole, padding, module.padding_idx = module.weight, module.padding_idx, None
        for number, batch in enumerate(self._batches):
            tokens, places = np.unique(batch, return_inverse=True)
            module.weight = torch.nn.Parameter(self._rows_of(tokens), requires_grad=False)
            inputs = torch.from_numpy(places.reshape(batch.shape))
            self._hidden.put(number, self._pass(0, lambda hidden, *_, **__: hidden, input_ids=inputs))
        module.weight, module.padding_idx = whole, padding

    def _rows_of(self, tokens: npt.NDArray[np.int64]) -> Any:
        """Rows of the embedding for sorted tokens, neighbours read together."""
        import torch

        runs = np.split(tokens, np.flatnonzero(np.diff(tokens) > 1) + 1)
        parts = [self._loader.rows(self._embedding_name, int(run[0]), int(run[-1]) + 1) for run in runs]
        return torch.cat(parts)

    def _layer(self, i: int, advance: Advance) -> None:
        layer = self._layers[i]
        self._loader.load([name for name in self._names if (found := self._stack.layer(name)) and found[0] == i])
        n_tokens = sum(batch.size for batch in self._batches)
        for number, batch in enumerate(self._batches):
            # What goes in tells the model only the shape, from which masks and rotary embeddings follow.
            hidden = self._hidden.get(number)
            self._hidden.put(number, self._pass(i, _on(layer, hidden), inputs_embeds=hidden))
            advance(batch.size / n_tokens)
        layer.to("meta")

    def _pass(self, i: int, instead: Callable[..., Any], **inputs: Any) -> Any:
        """What `instead` gives in place of layer i; the pass ends there."""
        capture = _Capture(instead)
        with switched_off(self._layers, {i: capture}), contextlib.suppress(_Reached):
            self._model.base_model(**inputs, use_cache=False)
        return capture.result

    def load_rows(self, start: int, stop: int) -> None:
        import torch

        rows = self._loader.rows(self._head_name, start, stop)
        self._head.weight = torch.nn.Parameter(rows, requires_grad=False)
        if self._bias_name is not None:
            self._head.bias = torch.nn.Parameter(self._loader.rows(self._bias_name, start, stop), requires_grad=False)

    def logits(self, number: int) -> Any:
        import torch

        hidden = self._hidden.get(number)
        with torch.no_grad(), switched_off(self._layers, {0: lambda *_, **__: hidden}):
            return self._model(inputs_embeds=hidden, use_cache=False).logits.float()

    def close(self) -> None:
        self._reader.close()
        self._hidden.close()


class _Reached(Exception):
    """What comes after is not needed."""


class _Capture:
    """In place of a layer's forward: keeps what a function makes of its arguments."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self._function = function
        self.result: Any = None

    def __call__(self, *arguments: Any, **keywords: Any) -> Any:
        self.result = self._function(*arguments, **keywords)
        raise _Reached


def _on(layer: Any, hidden: Any) -> Callable[..., Any]:
    """A layer's own forward, of these hidden states whatever comes in."""
    return lambda _, *others, **keywords: type(layer).forward(layer, hidden, *others, **keywords)


def _name_of(model: Any, wanted: Any) -> str:
    return next(str(name) for name, module in model.named_modules() if module is wanted)


class HiddenStates:
    """Arrays of known shapes, float32; in memory if they all fit a budget, else in a temporary file without a name."""

    def __init__(self, shapes: Sequence[tuple[int, ...]], budget: int) -> None:
        self._shapes = shapes
        sizes = [4 * int(np.prod(shape)) for shape in shapes]
        self._offsets = [sum(sizes[:number]) for number in range(len(sizes))]
        self.spilled = sum(sizes) > budget
        self._file = tempfile.TemporaryFile(prefix="merge-hidden-") if self.spilled else None  # noqa: SIM115
        self._memory: dict[int, Any] = {}

    def put(self, number: int, values: Any) -> None:
        if self._file is None:
            self._memory[number] = values.clone()
            return
        data = np.ascontiguousarray(values.numpy()).data.cast("B")
        done = 0
        try:
            while done < len(data):
                done += os.pwrite(self._file.fileno(), data[done:], self._offsets[number] + done)
        except OSError as error:
            raise OutputError(
                f"{tempfile.gettempdir()}: hidden states cannot be kept there ({error.strerror}). Free some disk, "
                "point TMPDIR to another, or take less text."
            ) from error

    def get(self, number: int) -> Any:
        import torch

        if self._file is None:
            return self._memory[number]
        data = np.empty(self._shapes[number], np.float32)
        view, done = data.data.cast("B"), 0
        while done < len(view):
            count = os.preadv(self._file.fileno(), [view[done:]], self._offsets[number] + done)
            if count == 0:
                raise OutputError(f"{tempfile.gettempdir()}: hidden states that were kept there are cut short.")
            done += count
        return torch.from_numpy(data)

    def close(self) -> None:
        self._memory.clear()
        if self._file is not None:
            self._file.close()

    def __enter__(self) -> HiddenStates:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
