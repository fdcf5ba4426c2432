"""collect_statistics: a model and a text -> a statistics file; resumable, to the same bytes."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from merge.architecture import find_stacks, main_stack
from merge.checkpoint import Checkpoint, open_checkpoint
from merge.checkpoint.reader import SourceReader
from merge.errors import CheckpointError
from merge.loading import code_that_ran, load_tokenizer
from merge.recipe.model import ModelRef
from merge.statistics.data import Batches, make_batches, read_texts
from merge.statistics.fisher import fisher_information
from merge.statistics.gram import Layerwise, whole_grams
from merge.statistics.models import Loader, empty_model_of, obstacle, whole_model
from merge.statistics.parts import Parts

KINDS = {"gram": ("gram",), "fisher": ("fisher",), "both": ("gram", "fisher")}
_WHOLE_GRAM, _FISHER = "gram.safetensors", "fisher.safetensors"


@dataclass(frozen=True)
class Summary:
    """What was collected."""

    out: str
    kinds: tuple[str, ...]
    tokens: int
    sequences: int
    tensors: int
    resumed_parts: int
    seconds: float
    notes: tuple[str, ...]


def collect_statistics(
    model: ModelRef,
    data: Path,
    out: Path,
    *,
    kind: str = "gram",
    max_tokens: int = 65536,
    length: int = 512,
    batch: int = 8,
    seed: int = 0,
    force: bool = False,
    progress: Callable[[int], None] = lambda done: None,
) -> Summary:
    """Writes `out`; `out`.partial holds the parts that are done, which the same call goes on with.

    Args:
        data: .jsonl with "text" in each line, or a file with a text in each line.
        kind: "gram", "fisher" or "both".
        max_tokens, length, batch: most tokens in all, tokens of a sequence, sequences at once (for Gram matrices).
        seed: of the order of the texts, the first of which are used.
        progress: gets bytes of the model that are done, once for each kind.

    Raises:
        MergeError: see merge.errors; `out`.partial stays.
    """
    began = time.monotonic()
    texts = read_texts(data)
    checkpoint = open_checkpoint(model)  # refuses an adapter: transformers would run the model without it
    batches = make_batches(load_tokenizer(checkpoint.path), texts, max_tokens, length, batch, seed)
    run = {
        "kind": kind,
        "files": {Path(file.path).name: [file.size, file.mtime_ns] for file in checkpoint.files},
        "batches": hashlib.sha256(repr(batches.all).encode()).hexdigest(),
        "versions": {name: metadata.version(name) for name in ("merge-workbench", "torch", "transformers")},
    }
    parts = Parts(out, run, force)
    size, done = sum(ref.nbytes for ref in checkpoint.tensors.values()), 0.0

    def advance(share: float) -> None:
        nonlocal done
        done += share * size
        progress(round(done))

    work = _Work(checkpoint, batches, parts, advance)
    for one in KINDS[kind]:
        work.gram() if one == "gram" else work.fisher()
    tensors = parts.complete(
        work.parts,
        {
            "model": Path(model.text).name,
            "kinds": " ".join(KINDS[kind]),
            "tokens": str(batches.tokens),
            "sequences": str(batches.sequences),
            "seed": str(seed),
            **({"trusted_code": json.dumps(code)} if (code := code_that_ran()) else {}),
        },
    )
    seconds = time.monotonic() - began
    notes = tuple(work.notes)
    return Summary(
        str(out), KINDS[kind], batches.tokens, batches.sequences, tensors, work.resumed, round(seconds, 3), notes
    )


class _Work:
    """One run: the parts it made or found, in the order of the file."""

    def __init__(
        self, checkpoint: Checkpoint, batches: Batches, parts: Parts, advance: Callable[[float], None]
    ) -> None:
        self._checkpoint, self._batches, self._parts, self._advance = checkpoint, batches, parts, advance
        self._whole: Any = None
        self.parts: list[str] = []
        self.notes: list[str] = []
        self.resumed = 0

    def gram(self) -> None:
        model = empty_model_of(self._checkpoint)
        with SourceReader(self._checkpoint.files) as reader:
            loader = Loader(model, self._checkpoint, reader)
            stack = main_stack(find_stacks(self._checkpoint.tensors, self._checkpoint.config), self._checkpoint.config)
            reason = obstacle(model, loader)
            if stack is not None and reason is None:
                layers = Layerwise(model, stack, loader, self._batches, self._parts)
                self.resumed += layers.run(self._advance)
                self.parts += layers.parts
                reader.check_unchanged()
                return
        self.notes.append(f"the whole model is held in memory: {reason or 'it has no stack of layers'}.")
        self._once(
            _WHOLE_GRAM, lambda: whole_grams(self._model(), set(self._checkpoint.tensors), self._batches, self._advance)
        )

    def fisher(self) -> None:
        self._once(
            _FISHER,
            lambda: fisher_information(self._model(), set(self._checkpoint.tensors), self._batches, self._advance),
        )

    def _once(self, part: str, make: Callable[[], dict[str, Any]]) -> None:
        self.parts.append(part)
        if self._parts.has(part):
            self.resumed += 1
            self._advance(1.0)
            return
        tensors = make()
        if not tensors:
            raise CheckpointError(
                f"{self._checkpoint.path}: transformers names the tensors of this model differently from its files, so "
                "its statistics could not be told apart. Save the model again with transformers."
            )
        self._parts.save(part, tensors)

    def _model(self) -> Any:
        if self._whole is None:
            self._whole = whole_model(self._checkpoint.path)
        return self._whole
