"""LayerRunner: one decoder layer in memory, run by the model's own forward.

A pass is the model's forward in which the layers before one pass the hidden state on, and which ends after that one.
So masks, positions, scaled embeddings, windows and soft caps are the model's own, whatever its architecture. A trial
with layers that compute nothing shows beforehand whether that is allowed: each layer must take what the one before it
gave, and nothing else that depends on the layers before.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from merge.errors import CheckpointError
from merge.layerwise.trial import FORMS, Unstreamable, find_form
from merge.layerwise.weights import LayerWeights, ModelParameter, are_large
from merge.loading import alike_but_for_the_last, check_alike

if TYPE_CHECKING:
    from torch import Tensor
    from torch.nn import Module
    from transformers.utils import ModelOutput

ROWS = 8192  # a larger embedding is read by rows, as that of the input tokens always is


class _Reached(Exception):
    """Ends a pass; the rest of the forward is not needed."""

    def __init__(self, hidden: Tensor) -> None:
        super().__init__()
        self.hidden = hidden


@dataclass
class _Pass:
    """The instructions for a thread's forward.

    Attributes:
        stop: the layer that is run, and behind which the pass ends; None: none is, and the pass goes on to the head.
        hidden: what goes into the first layer in place of the embedded tokens; None: those.
        runs: whether layer `stop` is run, or ends the pass in front of it.
        trial: what a trial notes, (layer, hidden state, what else it takes), in place of running any.
        blank: whether embeddings need not be read.
    """

    stop: int | None = None
    hidden: Tensor | None = None
    runs: bool = True
    trial: list[tuple[int, Any, Any]] | None = None
    blank: bool = False


class LayerRunner:
    """One model, one layer in memory.

    Attributes:
        model: with parameters on the meta device, but for those in use.
        layers: its decoder layers.
        prefix: what the names of their parameters begin with, before the number.
        weights: its numbers, with a count of what was in memory at most.
        path: of its directory, for errors.
        form: the hidden state -> what a layer gives, a tuple perhaps.
        needs_embedding: whether layers take something that depends on the embedded tokens, beside the hidden state.
        trial_tokens: two short sequences that differ in the last token only.
    """

    def __init__(self, model: Module, prefix: str, weights: LayerWeights, path: str) -> None:
        """Raises Unstreamable."""
        self.model, self.prefix, self.weights = model, prefix, weights
        self.layers: list[Module] = list(model.get_submodule(prefix.rstrip(".")))
        self._of_layer: list[list[ModelParameter]] = [[] for _ in self.layers]
        self.form, self.needs_embedding = FORMS[0], True
        self._local, self._lock, self.path = threading.local(), threading.Lock(), path
        self.trial_tokens = alike_but_for_the_last(model)
        self._head: Any = model.get_output_embeddings()
        outer = self._sort()
        for number, layer in enumerate(self.layers):
            layer.forward = functools.partial(self._layer, number)
            self._load_experts_when_used(number)
        self._load_when_used(outer)
        find_form(self)

    @property
    def vocabulary(self) -> int:
        """Rows of the head."""
        return int(self._head.out_features)

    def shape(self, tokens: Tensor) -> tuple[int, ...]:
        """The shape of the hidden state of tokens (sequence, token), before and after every layer."""
        return (*self._shape[:-3], *tokens.shape, self._shape[-1])

    # ---- passes

    def embed(self, tokens: Tensor) -> Tensor:
        """The input of the first layer.

        Args:
            tokens: (sequence, token) int64.
        """
        return self._run(tokens, stop=0, runs=False)

    @contextlib.contextmanager
    def layer(self, number: int) -> Iterator[Callable[[Any, Any], Any]]:
        """Loads one layer; returns run(tokens, hidden state before it) -> hidden state after it.

        Any number of threads may run it.

        Raises:
            CheckpointError: the layer's output for a token depends on later tokens.
        """
        self.weights.load(self._of_layer[number])
        try:
            trial = self.trial_tokens
            check_alike(self._run(trial, hidden=self.embed(trial), stop=number), self.path)
            yield lambda tokens, hidden: self._run(tokens, hidden=hidden, stop=number)
        finally:
            self.weights.drop(self._of_layer[number])

    def load_head(self, start: int, stop: int) -> None:
        """Chooses the rows of the head, hence the tokens, that `finish` computes."""
        for key in ("weight", "bias"):
            if getattr(self._head, key, None) is not None:
                slot = self.weights.slots[f"{name_of(self.model, self._head)}.{key}"]
                rows = self.weights.borrow(self.weights.rows(slot, start, stop))
                self._head._parameters[key] = _parameter(rows)

    def finish(self, tokens: Tensor, hidden: Tensor, blank: bool = True) -> Tensor:
        """Hidden state after the last layer -> logits (sequence, token, row of the head).

        Args:
            blank: whether the part before the layers may be skipped because it does not affect the result.
        """
        with self._asked(hidden=hidden, **({} if blank else {"blank": False})):
            return self._forward(self.model, tokens).logits.float()

    def _run(self, tokens: Tensor, **asked: object) -> object:
        with self._asked(**asked):
            try:
                self._forward(self.model.base_model, tokens)
            except _Reached as reached:
                return reached.hidden
        raise Unstreamable("its forward does not reach its layers")

    def _forward(self, model: Module, tokens: Tensor) -> ModelOutput:
        import torch

        with torch.no_grad():
            return model(input_ids=tokens, use_cache=False)

    @contextlib.contextmanager
    def _asked(self, **asked: Any) -> Iterator[None]:
        # The part before the layers is skipped if it makes no difference.
        blank = asked.get("hidden") is not None and not self.needs_embedding
        self._local.now = _Pass(**{"blank": blank, **asked})
        try:
            yield
        finally:
            del self._local.now

    def _layer(self, number: int, *arguments: object, **keywords: object) -> object:
        """Replaces a layer's forward."""
        now, layer = self._local.now, self.layers[number]
        place = None if arguments else next(iter(keywords))
        hidden = arguments[0] if place is None else keywords[place]
        if now.trial is not None:
            return self._tried(number, hidden, (arguments[1:], {k: v for k, v in keywords.items() if k != place}))
        if number == 0 and now.hidden is not None:
            hidden = now.hidden
        if number != now.stop:
            return self.form(hidden)
        if not now.runs:
            raise _Reached(hidden)
        if place is None:
            arguments = (hidden, *arguments[1:])
        else:
            keywords[place] = hidden
        given = type(layer).forward(layer, *arguments, **keywords)
        raise _Reached(given[0] if isinstance(given, tuple) else given)

    # ---- weights outside the layers

    def _sort(self) -> dict[Module, list[ModelParameter]]:
        """Assigns the parameters to their layers; returns those outside, by module."""
        outer: dict[Module, list[ModelParameter]] = {}
        for slot in self.weights.all:
            if not slot.pieces:  # a buffer that has its values
                continue
            inside = {number for number in map(self.layer_of, slot.names) if number is not None}
            for number in inside:
                self._of_layer[number].append(slot)
            if not inside:
                for module in {module for module, _ in slot.places}:
                    outer.setdefault(module, []).append(slot)
        return outer

    def layer_of(self, name: str) -> int | None:
        """The layer that a parameter is in; None for one outside."""
        number = name.removeprefix(self.prefix).partition(".")[0]
        return int(number) if name.startswith(self.prefix) and number.isdecimal() else None

    def _load_when_used(self, outer: Mapping[Module, list[ModelParameter]]) -> None:
        """Loads small parameters when their module is first called, and keeps them; embeddings are read by rows."""
        from torch import nn

        loaded: set[ModelParameter] = set()

        def load(slots: Sequence[ModelParameter]) -> None:
            with self._lock:
                self.weights.load([slot for slot in slots if slot not in loaded])
                loaded.update(slots)

        for module, slots in outer.items():
            if not isinstance(module, nn.Embedding):  # `load_head` loads the head's, under any other name
                slots = [slot for slot in slots if all(holder is not self._head for holder, _ in slot.places)]
            if self._is_read_by_rows(module, slots):
                module.forward = functools.partial(self._embedded, module, slots[0])
            else:
                module.register_forward_pre_hook(lambda *_, slots=tuple(slots): load(slots))

    def _load_experts_when_used(self, number: int) -> None:
        """Keeps large experts that are modules in a list in memory only while they are called."""
        from torch import nn

        for name, module in self.layers[number].named_modules():
            if not isinstance(module, nn.ModuleList) or not name.endswith("experts"):
                continue
            inside = {each: expert for expert in module for each in expert.modules()}
            own: dict[Module, list[ModelParameter]] = {}
            for slot in self._of_layer[number]:
                if (expert := inside.get(slot.places[0][0])) is not None:
                    own.setdefault(expert, []).append(slot)
            if are_large([slot for slots in own.values() for slot in slots]):
                for expert, slots in own.items():
                    expert.register_forward_pre_hook(lambda *_, slots=slots: self.weights.load(slots))
                    expert.register_forward_hook(lambda *_, slots=slots: self.weights.drop(slots))
                listed = {slot for slots in own.values() for slot in slots}
                self._of_layer[number] = [slot for slot in self._of_layer[number] if slot not in listed]

    def _is_read_by_rows(self, module: Module, slots: Sequence[ModelParameter]) -> bool:
        from torch import nn

        large = isinstance(module, nn.Embedding) and (
            module is self.model.get_input_embeddings() or module.num_embeddings > ROWS
        )
        # A subclass may make its own row numbers of other arguments.
        takes = len(inspect.signature(type(module).forward).parameters) == 2
        return large and takes and len(slots) == 1 and slots[0].is_plain

    def _embedded(self, module: Module, slot: ModelParameter, tokens: Tensor) -> Tensor:
        """An embedding's forward with only the rows that a batch needs, scaled as the model does."""
        import torch

        if self._local.now.blank:
            return torch.zeros(*tokens.shape, *slot.shape[1:])
        numbers, places = np.unique(tokens.numpy(), return_inverse=True)
        if numbers[-1] >= slot.shape[0]:
            raise CheckpointError(
                f"{self.path}: its tokenizer has token {numbers[-1]}, its embedding {slot.shape[0]} rows. Are the "
                "tokenizer's files of another model?"
            )
        rows = self.weights.borrow(self.weights.rows_of(slot, numbers))
        with self._lock:
            whole, padding, module.padding_idx = module.weight, module.padding_idx, None
            module.weight = _parameter(rows)
            try:
                return type(module).forward(module, torch.from_numpy(places.reshape(tokens.shape)))
            finally:
                module.weight, module.padding_idx = whole, padding

    # ---- trials

    def trial(self, marker: float, blank: bool = False) -> list[object]:
        """The other arguments of each layer, in a trial where each adds a number to the hidden state."""
        self._marker = marker
        calls: list[tuple[int, Any, Any]] = []
        self._run(self.trial_tokens, trial=calls, blank=blank)
        if [number for number, _, _ in calls] != list(range(len(self.layers))):
            raise Unstreamable("its layers are not called one after another")
        self._shape = tuple(calls[0][1].shape)
        if self._shape[-3:-1] != tuple(self.trial_tokens.shape):
            raise Unstreamable("its hidden states are in another order than sequences of tokens")
        return [others for _, _, others in calls]

    def _tried(self, number: int, hidden: Tensor, others: object) -> object:
        calls = self._local.now.trial
        assert calls is not None
        if calls and hidden is not calls[-1][1]:
            raise Unstreamable("it changes the hidden state between its layers")
        given = hidden + self._marker
        calls.append((number, given, others))
        if number == len(self.layers) - 1:
            raise _Reached(given)
        return self.form(given)


def _parameter(values: Tensor) -> Tensor:
    from torch import nn

    return nn.Parameter(values, requires_grad=False)


def name_of(model: Module, wanted: object) -> str:
    return next(str(name) for name, module in model.named_modules() if module is wanted)
