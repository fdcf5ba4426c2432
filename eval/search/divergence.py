"""How far candidates are from one model on a text: the KL divergence of the next token, in nats, as an objective.

KL(q || p) = sum_v q(v) (log q(v) - log p(v)), of the model's distribution q from the candidate's p, at every token of a
line given those before it. Each line is an item; a score is the mean over tokens, and less is better.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import random
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from eval.harness import Examiner
from eval.memory import Memory
from eval.models import Subject, subjects
from eval.results import ModelScores, Results, TaskResult, versions
from eval.samples import aggregate, as_pairs
from eval.search.judges import Candidate
from eval.search.live import LiveModel
from eval.search.objective import Scores, TaskScore
from eval.settings import Settings
from merge.errors import MergeError, NumbersError, UsageError
from merge.statistics.data import read_texts

if TYPE_CHECKING:
    from eval.model_proxy import RememberingLM

TASK = "kl"
_HELD = 512 << 20  # bytes of the model's distributions that are kept


class DivergenceJudge:
    """A judge of one task, `kl`, whose items are the lines of a text."""

    def __init__(self, model: str, data: Path, settings: Settings, memory: Memory, share: float) -> None:
        """
        Args:
            model: that candidates should be close to.
            data: a text, or .jsonl with a "text" in each line.
            share: of the lines that the search may use.

        Raises:
            UsageError: a text of fewer than two lines.
        """
        self._texts = [text for text in read_texts(data) if text.strip()]
        places = list(range(len(self._texts)))
        random.Random(f"{settings.seed}:{TASK}").shuffle(places)
        aside = min(max(1, round(share * len(places))), len(places) - 1)
        if aside < 1:
            raise UsageError(f"--data {data}: a search needs two lines of text or more, to choose by and to report on.")
        self.tasks: tuple[str, ...] = (TASK,)
        self.items: Mapping[str, tuple[int, ...]] = {TASK: tuple(sorted(places[:aside]))}
        self._rest = tuple(sorted(places[aside:]))
        self._settings, self._memory = settings, memory
        self._examiner = Examiner([], settings, memory)
        self._live = LiveModel(settings, memory)
        self._stack = contextlib.ExitStack()
        self._model = self._examiner.open(subjects([model])[0], self._stack)
        self._known: dict[int, Any] = {}  # line -> the model's log-probabilities
        self._held = 0

    def about(self) -> dict[str, object]:
        sides = {TASK: {"search": list(self.items[TASK]), "report": list(self._rest)}}
        return {"tasks": [TASK], "items": sides, "from": self._model.digest, "settings": self._settings.of_numbers()}

    def scores(self, candidate: Candidate, items: Mapping[str, Sequence[int]]) -> Scores:
        found = self._asked(candidate.subject, candidate.recipe is not None, items.get(TASK, self.items[TASK]))[1]
        mean = float(aggregate(TASK, *as_pairs(list(found.values())).sum(axis=0)))
        return {TASK: TaskScore(mean, dict(found), TASK, False)}

    def report(self, candidates: Sequence[Candidate]) -> Results:
        rows = [self._row(candidate) for candidate in candidates]
        said = dataclasses.asdict(self._settings) | {"include": None, "samples": {TASK: list(self._rest)}}
        return Results(tuple(rows), (TASK,), said, versions())

    def _row(self, candidate: Candidate) -> ModelScores:
        began = time.monotonic()
        subject = candidate.subject
        digest, found = self._asked(subject, candidate.recipe is not None, self._rest)
        mean = float(aggregate(TASK, *as_pairs(list(found.values())).sum(axis=0)))
        key = f"{TASK},none"
        items = tuple(found.values())
        task = TaskResult(TASK, None, {key: mean}, key, False, len(items), self._model.digest, tuple(found), items)
        seconds = time.monotonic() - began
        parents = subject.parents
        return ModelScores(
            candidate.name, subject.text, subject.place, digest, parents, seconds, len(items), 0, {TASK: task}
        )

    def _asked(self, subject: Subject, live: bool, lines: Sequence[int]) -> tuple[str, dict[int, tuple[float, float]]]:
        """The digest, and of each line the sum over its tokens and their number."""
        with contextlib.ExitStack() as stack:
            model = (self._live if live else self._examiner).open(subject, stack)
            keys = {line: model.key(TASK, [self._model.digest, self._texts[line]]) for line in lines}
            known = self._memory.answers(keys.values())
            for line, key in keys.items():
                if key not in known:
                    known[key] = self._divergence(model, line)
                    self._memory.store(key, known[key])
            return model.digest, {line: (known[key][0], known[key][1]) for line, key in keys.items()}

    def _divergence(self, model: RememberingLM, line: int) -> list[float]:
        mine, theirs = self._of_model(line), _log_probabilities(model, self._texts[line])
        if mine.shape != theirs.shape:
            raise MergeError("--kl-from: the model and a candidate cut the text, or count tokens, in different ways.")
        shares = mine.exp()
        found = float((shares * (mine - theirs)).where(shares != 0, 0.0).sum())  # 0 log 0 = 0
        if math.isnan(found):
            raise NumbersError("--kl-from: a candidate gives NaN. Its weights overflow, or hold NaN.")
        return [max(0.0, found), float(len(mine))]

    def _of_model(self, line: int) -> Any:
        if line in self._known:
            return self._known[line]
        found = _log_probabilities(self._model, self._texts[line])
        if self._held + found.nbytes <= _HELD:
            self._held += found.nbytes
            self._known[line] = found
        return found


def _log_probabilities(model: RememberingLM, text: str) -> Any:
    """(tokens, vocabulary) float32: log p of what follows the beginning and each token but the last."""
    import torch

    inner: Any = model.inner
    if not hasattr(inner, "_model_call"):
        raise UsageError("--kl-from: needs --backend hf, which gives the probability of every token.")
    tokens = [inner.prefix_token_id, *inner.tok_encode(text)][: inner.max_length + 1]
    with torch.no_grad():
        return inner._model_call(torch.tensor([tokens[:-1]], device=inner.device))[0].float().log_softmax(-1).cpu()
