"""Diagonal Fisher information: the mean over sequences of the squared gradient of the sequence's log-likelihood.

The tokens are the text's own (the empirical Fisher). The whole model is in memory, in float32, with its gradients, and
the sums in float64: 16 bytes for each parameter.
"""

from __future__ import annotations

from typing import Any

from merge.checkpoint import Checkpoint
from merge.statistics.data import Batches
from merge.statistics.gram import Advance


def fisher_bytes(checkpoint: Checkpoint) -> int:
    """Memory for weights, gradients and sums."""
    return 16 * sum(ref.size for ref in checkpoint.tensors.values())


def fisher_information(model: Any, names: set[str], batches: Batches, advance: Advance) -> dict[str, Any]:
    """ "fisher.NAME" -> float32, as the weight, for every parameter of the model that is among `names`"""
    import torch

    parameters = {name: parameter for name, parameter in model.named_parameters() if name in names}
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in names)
    sums = {name: torch.zeros(parameter.shape, dtype=torch.float64) for name, parameter in parameters.items()}
    n_sequences = 0
    for batch in batches.all:
        for sequence in batch:  # one at a time: squares are taken of each sequence's own gradient
            tokens = torch.tensor([sequence])
            logits = model(input_ids=tokens, use_cache=False).logits[0, :-1]
            likelihood = torch.log_softmax(logits.float(), dim=-1).gather(1, tokens[0, 1:, None]).sum()
            gradients = torch.autograd.grad(likelihood, list(parameters.values()), allow_unused=True)
            for total, gradient in zip(sums.values(), gradients, strict=True):
                if gradient is not None:
                    total.addcmul_(gradient.double(), gradient.double())
            n_sequences += 1
            advance(len(sequence) / batches.tokens)
    return {f"fisher.{name}": (total / n_sequences).float() for name, total in sorted(sums.items())}
