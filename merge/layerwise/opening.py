"""open_runner: opens a checkpoint's runner, or gives the reason why the whole model must be in memory."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from merge.architecture import find_stacks, main_stack
from merge.architecture.loaded import Makings, makings_of
from merge.checkpoint import Checkpoint
from merge.checkpoint.reader import SourceReader
from merge.errors import UsageError
from merge.layerwise.empty import empty_model
from merge.layerwise.runner import LayerRunner, name_of
from merge.layerwise.trial import Unstreamable, check_end
from merge.layerwise.weights import LayerWeights
from merge.loading import check_stored

if TYPE_CHECKING:
    from torch.nn import Module


def open_runner(
    checkpoint: Checkpoint, reader: SourceReader, max_ram: int | None, say: Callable[[str], None]
) -> LayerRunner | None:
    """The runner of a model; None if it must be in memory as a whole, which a note reports with its memory.

    Raises:
        CheckpointError: transformers does not know the architecture, tensors are missing or have no place in the model,
            or it is not a causal language model.
        UsageError: the whole model takes more than max_ram.
    """
    model = empty_model(checkpoint.path)
    makings = makings_of(model, checkpoint.tensors)
    check_stored(model, makings.shapes, checkpoint.path)
    weights = LayerWeights(model, makings.pieces, checkpoint.tensors, reader)
    try:
        _check_sources(model, weights, makings)
        stack = main_stack(find_stacks(weights.slots, checkpoint.config), checkpoint.config)
        if stack is None:
            raise Unstreamable("it has no stack of layers")
        runner = LayerRunner(model, stack.prefix, weights, checkpoint.path)
        check_end(runner)
        return runner
    except Unstreamable as error:
        nbytes = sum(4 * slot.empty.numel() for slot in weights.all)
        what = f"{checkpoint.path}: the whole model has to be in memory, {nbytes / 1e9:.3g} GB: {error}"
        if max_ram is not None and nbytes > max_ram:
            raise UsageError(f"{what}. --max-ram is {max_ram / 1e9:.3g} GB.") from None
        say(f"{what}.")
        return None


def _check_sources(model: Module, weights: LayerWeights, makings: Makings) -> None:
    """Raises Unstreamable for parameters that cannot be read piece by piece."""
    if makings.obscure:
        name, how = next(iter(makings.obscure.items()))
        raise Unstreamable(f"transformers makes {name} of its files by {how}")
    lacking = [
        slot
        for slot in weights.all
        if (makings.shapes[slot.names[0]] != slot.shape if slot.pieces else slot.empty.device.type == "meta")
    ]
    if lacking:
        raise Unstreamable(f"its files do not have {lacking[0].names[0]} as transformers makes it")
    head = model.get_output_embeddings()
    if type(head).__name__ != "Linear":
        raise Unstreamable("its head is not a linear layer")
    if not all(weights.slots[f"{name_of(model, head)}.{key}"].is_plain for key, _ in head.named_parameters()):
        raise Unstreamable("its head is not stored as one matrix")
