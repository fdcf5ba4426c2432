"""collect_statistics: writes the statistics file of a model on a text; resumable, with the same bytes."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from merge.checkpoint import Checkpoint, open_checkpoint
from merge.checkpoint.digest import file_digest
from merge.checkpoint.reader import SourceReader
from merge.codec import decode
from merge.errors import CheckpointError, UsageError
from merge.layerwise import open_runner, whole_model
from merge.loading import code_that_ran, load_tokenizer
from merge.output.workspace import Workspace
from merge.recipe.model import ModelRef
from merge.statistics.data import Batches, make_batches, read_texts
from merge.statistics.fisher import fisher_bytes, fisher_information
from merge.statistics.gram import Layerwise, whole_grams
from merge.statistics.parts import RUN, Parts, parts_of

KINDS = {"gram": ("gram",), "fisher": ("fisher",), "both": ("gram", "fisher")}
_WHOLE_GRAM, _FISHER = "gram.safetensors", "fisher.safetensors"


@dataclass(frozen=True)
class StatisticsSummary:
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
    max_ram: int | None = None,
    force: bool = False,
    say: Callable[[str], None] = lambda note: None,
    progress: Callable[[int], None] = lambda done: None,
) -> StatisticsSummary:
    """Writes `out`; `out`.partial holds finished parts, which the same call resumes.

    Args:
        data: .jsonl with "text" in each line, or a file with a text in each line.
        kind: "gram", "fisher" or "both".
        max_tokens, length, batch: most tokens in all, tokens of a sequence, sequences at once (for Gram matrices).
        seed: of the order of the texts; texts are used in that order up to the limit.
        max_ram: bytes that a model may take which is not run layer by layer; None: any.
        say: gets what a user should know before the work starts.
        progress: gets bytes of the model that are done, once for each kind.

    Raises:
        MergeError: see merge.errors; `out`.partial stays.
    """
    began = time.monotonic()
    texts = read_texts(data)
    checkpoint = open_checkpoint(model)  # refuses an adapter: transformers would run the model without it
    _check_memory(checkpoint, kind, max_ram)
    paths = [file.path for file in checkpoint.files]
    batches = make_batches(load_tokenizer(checkpoint.path), texts, max_tokens, length, batch, seed)
    identity = {
        "kind": kind,
        "files": {
            Path(path).name: file_digest(path) for path in (*paths, os.path.join(checkpoint.path, "config.json"))
        },
        "batches": hashlib.sha256(repr(batches.all).encode()).hexdigest(),
        "versions": {name: metadata.version(name) for name in ("merge-workbench", "torch", "transformers")},
    }
    size, done = sum(ref.nbytes for ref in checkpoint.tensors.values()), 0.0

    def advance(share: float) -> None:
        nonlocal done
        done += share * size
        progress(round(done))

    sources = [(model.text, path) for path in paths]
    work = Workspace(out, RUN, "merge statistics", identity, force=force, sources=sources, kind="file")
    with parts_of(work) as parts:
        if parts.finished is not None:
            return decode(parts.finished, StatisticsSummary)
        collection = _Collection(checkpoint, batches, parts, max_ram, say, advance)
        for one in KINDS[kind]:
            collection.gram() if one == "gram" else collection.fisher()
        with SourceReader(checkpoint.files) as reader:
            reader.check_unchanged()
        facts = {
            "model": Path(model.text).name,
            "kinds": " ".join(KINDS[kind]),
            "tokens": str(batches.tokens),
            "sequences": str(batches.sequences),
            "seed": str(seed),
            **({"trusted_code": json.dumps(code)} if (code := code_that_ran()) else {}),
        }
        summary = StatisticsSummary(
            out=str(out),
            kinds=KINDS[kind],
            tokens=batches.tokens,
            sequences=batches.sequences,
            tensors=parts.join(collection.parts, facts, parts.result),
            resumed_parts=collection.resumed,
            seconds=round(time.monotonic() - began, 3),
            notes=tuple(collection.notes),
        )
        parts.work.complete(dataclasses.asdict(summary))
        return summary


def _check_memory(checkpoint: Checkpoint, kind: str, max_ram: int | None) -> None:
    needed = fisher_bytes(checkpoint) if "fisher" in KINDS[kind] else 0
    if max_ram is not None and needed > max_ram:
        raise UsageError(
            f"{checkpoint.path}: Fisher information needs the whole model in memory, with gradients and sums: "
            f"{needed / 1e9:.3g} GB. --max-ram is {max_ram / 1e9:.3g} GB."
        )


class _Collection:
    """One run: the parts that it made or found, in the order of the file."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        batches: Batches,
        parts: Parts,
        max_ram: int | None,
        say: Callable[[str], None],
        advance: Callable[[float], None],
    ) -> None:
        self._checkpoint, self._batches, self._parts, self._advance = checkpoint, batches, parts, advance
        self._max_ram, self._tell = max_ram, say
        self._whole: Any = None
        self.parts: list[str] = []
        self.notes: list[str] = []
        self.resumed = 0

    def _say(self, note: str) -> None:
        self.notes.append(note)
        self._tell(note)

    def gram(self) -> None:
        with SourceReader(self._checkpoint.files) as reader:
            runner = open_runner(self._checkpoint, reader, self._max_ram, self._say)
            if runner is not None:
                layers = Layerwise(runner, self._batches, self._parts)
                self.resumed += layers.run(self._advance)
                self.parts += layers.parts
                return
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
                f"{self._checkpoint.path}: transformers names the tensors of this model differently from its "
                "files, so its statistics cannot be matched. Save the model again with transformers."
            )
        self._parts.save(part, tensors)

    def _model(self) -> object:
        if self._whole is None:
            self._whole = whole_model(self._checkpoint.path)
        return self._whole
