"""One model in memory whose weights are replaced by those of each candidate: nothing is written to disk."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import xxhash

from eval.backends import load_model
from eval.memory import Memory, key_of
from eval.model_proxy import RememberingLM
from eval.models import Subject
from eval.settings import Settings
from merge.output.manifest import MANIFEST
from merge.output.scratch import scratch
from merge.output.sink import MemorySink
from merge.plan import Plan

if TYPE_CHECKING:
    from lm_eval.api.model import LM
    from torch import Tensor

_SCRATCH = "merge-search-model-"
_ABOUT = (MANIFEST, "merge_recipe.yaml", "README.md")  # files that say how a model was made, and change no answer


class LiveModel:
    """Opens candidates as lm-eval's models. The first is loaded from a temporary directory, as any model is; of others
    only the weights are put into it, if their config and tokenizer are the same and every weight has a place."""

    def __init__(self, settings: Settings, memory: Memory, threads: int | None = None) -> None:
        self._settings, self._memory, self._threads = settings, memory, threads
        self._model: LM | None = None
        self._files: dict[str, bytes] = {}  # of the loaded model
        self._places: dict[str, Tensor] | None = None  # where its weights are, by the names in a checkpoint

    def open(self, subject: Subject, stack: contextlib.ExitStack) -> RememberingLM:
        """A candidate, merged when its first question has no answer yet. Raises as run_plan does."""
        plan = subject.plan
        assert plan is not None
        merged: list[MemorySink] = []
        key = key_of("merged in memory", plan.to_json())
        digest = self._memory.digest(key)
        if digest is None:
            merged.append(self._merged(plan))
            digest = _digest(merged[0])
            self._memory.store_digest(key, digest)

        def load() -> LM:
            return self._load(merged.pop() if merged else self._merged(plan))

        return RememberingLM(load, self._memory, digest, self._settings.of_numbers(), lambda: None)

    def _merged(self, plan: Plan) -> MemorySink:
        from merge import run_plan

        sink = MemorySink(plan)
        run_plan(plan, sink, threads=self._threads)
        return sink

    def _load(self, sink: MemorySink) -> LM:
        import torch

        files = _side_files(sink)
        tensors = sink.tensors()
        if self._places is None or files != self._files or tensors.keys() != self._places.keys():
            self._model = self._places = None  # freed before the next is loaded
            self._model, self._files = self._from_disk(sink.plan), files
            self._places = _places(self._model, tensors)
            return self._model
        with torch.no_grad():
            for name, tensor in tensors.items():
                self._places[name].copy_(tensor)
        assert self._model is not None
        return self._model

    def _from_disk(self, plan: Plan) -> LM:
        from merge import run_plan

        with scratch(_SCRATCH) as work:
            run_plan(plan, work / "model", threads=self._threads)
            return load_model(work / "model", self._settings)


def _places(model: LM, tensors: Mapping[str, Tensor]) -> dict[str, Tensor] | None:
    """Where the model holds each tensor; None if it holds one elsewhere, otherwise, or more than these.

    Whether the names mean the same is seen by the values, which were read from the directory.
    """
    network: Any = getattr(model, "model", None)
    if not hasattr(network, "state_dict"):
        return None
    found = network.state_dict(keep_vars=True)
    places = {name: found[name].detach() for name in tensors if name in found}
    filled = {place.data_ptr() for place in places.values()}
    if len(places) < len(tensors) or any(each.data_ptr() not in filled for each in network.parameters()):
        return None
    same = (bool((places[name] == tensor.to(places[name])).all()) for name, tensor in tensors.items())
    return places if all(same) else None


def _side_files(sink: MemorySink) -> dict[str, bytes]:
    return {name: data for name, data in sink.files.items() if name not in _ABOUT}


def _digest(sink: MemorySink) -> str:
    """Of everything that answers depend on: weights, config, tokenizer."""
    steps = sink.plan.steps
    weights = [(step.name, step.dtype, step.shape, sink.records[place]["digest"]) for place, step in enumerate(steps)]
    files = sorted((name, xxhash.xxh3_128_hexdigest(data)) for name, data in _side_files(sink).items())
    return key_of("merged in memory", weights, files).hex()
