"""Hidden states of prompts in a model, which become the rows of a router; computed by merge.jobs.mixtures.gates."""

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
        embedding: the matrix (token, hidden).
        layers: for each layer, the names of its parameters and their sources.
        positive, negative: for each row of the router, its prompts as token ids; without any, the row is zero.
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
        """The prompts of all rows, positive ones first."""
        return [prompt for row in (*self.positive, *self.negative) for prompt in row]

    @property
    def bytes_read(self) -> int:
        return sum(ref.nbytes for refs in self.layers for ref in refs.values())

    @property
    def what(self) -> str:
        return "prompts are run through its base first"

    def held_bytes(self, threads: int) -> int:
        """Bytes for transformers, one layer in float32 and the states of all prompts."""
        tensors = [list(layer.values()) for layer in self.layers]
        layer = max(sum(ref.size for ref in refs) for refs in tensors)
        widest = max((ref.shape[0] for refs in tensors for ref in refs if len(ref.shape) > 1), default=0)
        longest = max(map(len, self.prompts), default=0)
        # The states before and after a layer, and what one prompt's MLP and attention hold on each thread.
        states = 2 * sum(map(len, self.prompts)) * self.embedding.shape[1]
        passing = threads * longest * (6 * self.embedding.shape[1] + 4 * widest + 64 * longest)
        return _TRANSFORMERS + 4 * (layer + states + passing)


FINDING = RouterPrompts
