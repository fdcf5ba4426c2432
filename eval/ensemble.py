"""Ensembles: several models that answer together, for comparison with their merge.

    choices      mean over the members of the probability of each continuation
    perplexity   mean of the probability of each token (members with the same tokens)
    generation   the text that most members wrote; of equally many the one of the member named first

Source: the ensembles that averages of weights are compared with (Wortsman et al. 2022, arXiv:2203.05482, section 3). It
costs a pass of every member for each request. Members answer one after the other, one in memory at a time, and what
they answered before is remembered.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from lm_eval.api.instance import Instance
from lm_eval.api.model import LM

from merge.errors import UsageError

if TYPE_CHECKING:
    from eval.model_proxy import RememberingLM


class EnsembleLM(LM):  # type: ignore[misc]
    """An lm-eval model that combines the answers of several."""

    def __init__(self, members: Sequence[RememberingLM]) -> None:
        super().__init__()
        self._members = tuple(members)
        self.tick: Callable[[int], None] = lambda n: None

    @property
    def asked(self) -> int:
        return sum(member.asked for member in self._members)

    @property
    def remembered(self) -> int:
        return sum(member.remembered for member in self._members)

    def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
        """The mixture's likelihood; greedy if most members would choose the text."""
        found = []
        for answers in self._each("loglikelihood", requests):
            greedy = sum(greedy for _, greedy in answers) > len(answers) / 2
            found.append((_log_mean([value for value, _ in answers]), greedy))
        return found

    def loglikelihood_rolling(self, requests: list[Instance]) -> list[float]:
        found = []
        for request, members in zip(requests, self._each("token_log_probabilities", requests), strict=True):
            if len({len(tokens) for tokens in members}) > 1:
                raise UsageError(
                    f"{request.task_name}: the members of the ensemble have different tokens, so token "
                    "probabilities cannot be averaged. Leave out the task, or the ensemble."
                )
            table = np.array(members)
            found.append(float((np.logaddexp.reduce(table, axis=0) - math.log(len(members))).sum()))
        return found

    def generate_until(self, requests: list[Instance]) -> list[str]:
        return [_vote(texts) for texts in self._each("generate_until", requests)]

    def _each(self, kind: str, requests: list[Instance]) -> list[tuple[Any, ...]]:
        """The answers of all members to each request."""
        columns = []
        for member in self._members:
            columns.append(getattr(member, kind)(requests))
            member.release()
        self.tick(len(requests))
        return list(zip(*columns, strict=True))

    @property
    def tokenizer_name(self) -> str:
        return self._members[0].tokenizer_name

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        return self._members[0].chat_template(chat_template)

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        return self._members[0].apply_chat_template(chat_history, add_generation_prompt)


def _log_mean(logs: Sequence[float]) -> float:
    return float(np.logaddexp.reduce(logs) - math.log(len(logs)))


def _vote(texts: Sequence[str]) -> str:
    """The most frequent text, without blanks around it; among equals the first, since Counter keeps the order."""
    best = Counter(text.strip() for text in texts).most_common(1)[0][0]
    return next(text for text in texts if text.strip() == best)
