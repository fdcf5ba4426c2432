"""Hidden states of prompts in a model, which become the rows of a router; merge.jobs.mixtures.gates finds them."""

from __future__ import annotations

from dataclasses import dataclass

from merge.plan import Finding, TensorRef

FINDER = "merge.jobs.mixtures.gates"
_TRANSFORMERS = 480 << 20  # with torch, and the classes of one architecture


@dataclass(frozen=True, slots=True)
class RouterPrompts(Finding):
    """Prompts that are run through a model before the steps.

    Attributes:
        model: in Plan.models.
        average: over all tokens of a prompt; else its last token's state counts.
        embedding: matrix of (token, hidden).
        layers: of each layer, the name of each parameter below it and where its numbers are.
        positive, negative: for each row of the router prompts as token numbers; none at all: a row of zeros.
    """

    model: int
    average: bool
    embedding: TensorRef
    layers: tuple[dict[str, TensorRef], ...]
    positive: tuple[tuple[tuple[int, ...], ...], ...]
    negative: tuple[tuple[tuple[int, ...], ...], ...]
    key: str = "router"
    finder: str = "router"

    @property
    def prompts(self) -> list[tuple[int, ...]]:
        """Those of all rows, the positive ones first."""
        return [prompt for row in (*self.positive, *self.negative) for prompt in row]

    @property
    def bytes_read(self) -> int:
        return sum(ref.nbytes for refs in self.layers for ref in refs.values())

    @property
    def what(self) -> str:
        return "prompts are run through its base first"

    def held_bytes(self, threads: int) -> int:
        """transformers, a layer in float32, the states of all prompts"""
        tensors = [list(layer.values()) for layer in self.layers]
        layer = max(sum(ref.size for ref in refs) for refs in tensors)
        widest = max((ref.shape[0] for refs in tensors for ref in refs if len(ref.shape) > 1), default=0)
        longest = max(map(len, self.prompts), default=0)
        # States of before and after a layer; what one prompt's MLP and attention hold on each thread.
        states = 2 * sum(map(len, self.prompts)) * self.embedding.shape[1]
        passing = threads * longest * (6 * self.embedding.shape[1] + 4 * widest + 64 * longest)
        return _TRANSFORMERS + 4 * (layer + states + passing)


FINDING = RouterPrompts
