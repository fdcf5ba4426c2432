"""Measures perplexity on a text, and the distance of two models: KL divergence, agreement on the next token.

A document is cut into windows of `context` tokens, each `stride` further on; a token is scored at most once, in the
first window that holds it, given the tokens before it there, so never as the first of a window.
perplexity = exp(mean negative log-likelihood of those tokens).
KL is that of the other model's next-token distribution q from this model's p, sum_v q(v) log(q(v) / p(v)), in nats.
Standard errors treat windows as the sample: that of a ratio of sums (Cochran 1977, section 6.4). The head is applied to
a block of tokens at a time; log-sum-exp and the sums of KL are carried from block to block, rescaled by the maximum.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from merge.arrays import F64
from merge.checkpoint.files import read_json
from merge.errors import NumbersError, UsageError
from merge.loading import load_tokenizer
from merge.statistics.data import read_texts
from merge.textfile import read_text
from merge.tools.logits import Batch, Logits, WholeLogits, open_logits

if TYPE_CHECKING:
    from torch.nn import Module

BUDGET = 256 << 20  # bytes of hidden states in memory
BATCH_TOKENS = 1024  # at once
BLOCK_ROWS = 4096  # rows of the head at a time
CONTEXT = 1024


@dataclass(frozen=True)
class TokenMean:
    """A mean over scored tokens; its standard error over windows, None for a single one."""

    value: float
    error: float | None


@dataclass(frozen=True)
class Perplexity:
    """One model's result on a text. `nll` is the mean negative log-likelihood of a token, in nats."""

    nll: TokenMean
    tokens: int  # scored
    windows: int
    documents: int

    @property
    def perplexity(self) -> TokenMean:
        value = math.exp(self.nll.value) if self.nll.value < 700 else math.inf
        return TokenMean(value, None if self.nll.error is None else value * self.nll.error)


@dataclass(frozen=True)
class Distance:
    """How far a model is from another on the same tokens: KL(other || model) in nats, share of equal best tokens."""

    kl: TokenMean
    top1: TokenMean


@dataclass(frozen=True)
class Windows:
    """Equally long windows side by side. `scored`: (windows, tokens - 1), whether the next token counts there."""

    tokens: Batch
    scored: npt.NDArray[np.bool_]


def measure(
    model: Path,
    data: Path,
    *,
    against: Path | None = None,
    context: int | None = None,
    stride: int | None = None,
    budget: int = BUDGET,
    max_ram: int | None = None,
    say: Callable[[str], None] = lambda note: None,
    progress: Callable[[float], None] = lambda share: None,
) -> tuple[Perplexity, Perplexity | None, Distance | None]:
    """Perplexity of a model; with another one also that one's, and the distance between them.

    Args:
        model, against: directories.
        data: .jsonl with a "text" in each line, each a document; any other file is one document.
        context: most tokens of a window; None: 1024, or what the model can take.
        stride: tokens from one window to the next; None: context, so that windows do not overlap.
        budget: bytes of hidden states that are kept in memory; more lie in a temporary file.
        max_ram: bytes that a model may take which cannot be run layer by layer; None: any.
        say: gets what a user should know before the work starts.
        progress: gets the share of the work that is done.

    Raises:
        UsageError: data that cannot be read, settings that do not fit, models with different vocabularies,
            more memory than max_ram.
        NumbersError: a model that gives NaN.
    """
    documents = read_documents(data)
    paths = [model] if against is None else [model, against]
    longest = min(_most_positions(path) for path in paths)
    if context is not None and context > longest:
        raise UsageError(f"--context {context:,}: the model takes at most {longest:,} tokens.")
    context = context or min(CONTEXT, longest)
    stride = stride or context
    if stride > context:
        raise UsageError(f"--stride {stride:,} is more than the context of {context:,}: tokens would be left out.")
    texts = [
        [tokenizer(text, verbose=False)["input_ids"] for text in documents]
        for tokenizer in map(load_tokenizer, map(str, paths))
    ]
    if against is not None and texts[0] != texts[1]:
        raise UsageError(
            f"{against}: makes other tokens of the text than {model}, so that single tokens cannot be compared. "
            "Measure the two without --against."
        )
    batches = cut(texts[0], context, stride)
    if not batches:
        raise UsageError(f"--data {data}: no text of at least two tokens.")
    done = 0.0

    def advance(share: float) -> None:
        nonlocal done
        done += share
        progress(done / (len(paths) + 1))

    models: list[Logits] = []
    try:
        # One after the other: what is open when the next one fails is closed.
        models.extend(open_logits(path, [batch.tokens for batch in batches], budget, max_ram, say) for path in paths)
        vocabularies = {each.vocabulary for each in models}
        if len(vocabularies) > 1:
            sizes = " and ".join(f"{each.vocabulary:,}" for each in models)
            raise UsageError(f"{against}: the vocabularies have {sizes} tokens; distributions cannot be compared.")
        for each in models:
            each.run(advance)
        sums = _over_blocks(models, paths, batches, advance)
    finally:
        for each in models:
            each.close()
    return _summary(sums, batches, len(documents), len(paths))


def of_network(network: Module, batches: Sequence[Batch], name: str) -> Perplexity:
    """The same for a model in memory, in its own dtype, on windows (windows, tokens) that are a text each."""
    windows = [Windows(batch, np.ones((len(batch), batch.shape[1] - 1), np.bool_)) for batch in batches]
    sums = _over_blocks([WholeLogits(network, batches)], [Path(name)], windows, lambda share: None)
    return _summary(sums, windows, sum(map(len, batches)), 1)[0]


def _most_positions(path: Path) -> int:
    config = read_json(str(path / "config.json"), unique=False)
    found = (config.get("text_config") or config).get("max_position_embeddings")
    return found if isinstance(found, int) and found > 1 else 1 << 30


def read_documents(path: Path) -> list[str]:
    """Raises UsageError for a file that cannot be read, with the line of a .jsonl."""
    if path.suffix in (".jsonl", ".json"):
        return read_texts(path)
    return [read_text(path, "--data")]


def cut(documents: Sequence[Sequence[int]], context: int, stride: int) -> list[Windows]:
    """Windows of all documents, in batches of equal length, in the order of the documents as far as lengths allow."""
    by_length: dict[int, list[tuple[Sequence[int], npt.NDArray[np.bool_]]]] = {}
    for tokens in documents:
        seen = 1  # the first token of a document has nothing to be predicted from
        for start in range(0, len(tokens), stride):
            window = tokens[start : start + context]
            if start + len(window) <= seen:
                break
            scored = np.arange(start + 1, start + len(window)) >= seen
            if len(window) > 1:
                by_length.setdefault(len(window), []).append((window, scored))
            seen = max(seen, start + len(window))
    found = []
    for length, windows in by_length.items():
        size = max(1, BATCH_TOKENS // length)
        for first in range(0, len(windows), size):
            tokens_of, scored_of = zip(*windows[first : first + size], strict=True)
            found.append(Windows(np.array(tokens_of, np.int64), np.array(scored_of)))
    return found


class _Running:
    """Carried over blocks of the vocabulary, for each model and each next token of one batch: shapes (models, n)."""

    def __init__(self, n_models: int, batch: Windows) -> None:
        n = batch.scored.size
        self.top = np.full((n_models, n), -np.inf)  # the highest logit so far
        self.best = np.zeros((n_models, n), np.int64)  # the token that has it
        self.mass = np.zeros((n_models, n))  # sum of exp(logit - top)
        self.target = np.zeros((n_models, n))  # logit of the token that comes
        self.cross = np.zeros(n)  # sum of exp(b - top of b) * (b - a), of the second model b and the first, a

    def add(self, start: int, blocks: Sequence[F64], targets: npt.NDArray[np.int64]) -> None:
        """blocks: (n, rows) logits of each model for tokens start.."""
        rows = np.arange(len(targets))
        inside = (targets >= start) & (targets < start + blocks[0].shape[1])
        for k, logits in enumerate(blocks):
            place = logits.argmax(axis=1)
            highest = logits[rows, place]
            better = highest > self.top[k]
            top = np.where(better, highest, self.top[k])
            self.best[k] = np.where(better, place + start, self.best[k])
            scale = np.exp(self.top[k] - top)
            weights = np.exp(logits - top[:, None])
            self.mass[k] = self.mass[k] * scale + weights.sum(axis=1)
            self.target[k][inside] = logits[inside, targets[inside] - start]
            self.top[k] = top
            if k == 1:
                self.cross = self.cross * scale + (weights * (logits - blocks[0])).sum(axis=1)

    def log_total(self) -> F64:
        """(models, n): log of the sum of exp over the vocabulary."""
        found: F64 = self.top + np.log(self.mass)
        return found


def _over_blocks(
    models: Sequence[Logits], paths: Sequence[Path], batches: Sequence[Windows], advance: Callable[[float], None]
) -> list[_Running]:
    running = [_Running(len(models), batch) for batch in batches]
    vocabulary = models[0].vocabulary
    step = BLOCK_ROWS if all(model.in_blocks for model in models) else vocabulary
    for start in range(0, vocabulary, step):
        stop = min(start + step, vocabulary)
        for model in models:
            model.load_rows(start, stop)
        for number, (batch, sums) in enumerate(zip(batches, running, strict=True)):
            blocks = [_block(model, path, number, stop - start) for model, path in zip(models, paths, strict=True)]
            sums.add(start, blocks, batch.tokens[:, 1:].reshape(-1))
        advance((stop - start) / vocabulary)
    return running


def _block(model: Logits, path: Path, number: int, rows: int) -> F64:
    """(next tokens, rows); float64, for sums over a vocabulary of 10^5 tokens."""
    found: F64 = model.logits(number)[:, :-1].reshape(-1, rows).double().numpy()
    if not np.isfinite(found).all():
        raise NumbersError(
            f"{path}: gives NaN or infinite logits on this text. Its weights hold NaN, or overflow in float32."
        )
    return found


def _summary(
    running: Sequence[_Running],
    batches: Sequence[Windows],
    documents: int,
    n_models: int,
) -> tuple[Perplexity, Perplexity | None, Distance | None]:
    losses = [sums.log_total() - sums.target for sums in running]
    counts = np.concatenate([batch.scored.sum(axis=1) for batch in batches])
    found = [
        Perplexity(
            _estimate(_by_window([loss[k] for loss in losses], batches), counts),
            int(counts.sum()),
            len(counts),
            documents,
        )
        for k in range(n_models)
    ]
    if n_models == 1:
        return found[0], None, None
    kl = []
    for sums in running:
        total = sums.log_total()
        kl.append(np.maximum(0.0, sums.cross / sums.mass[1] - total[1] + total[0]))  # below 0 by rounding only
    same = [(sums.best[0] == sums.best[1]).astype(np.float64) for sums in running]
    distance = Distance(_estimate(_by_window(kl, batches), counts), _estimate(_by_window(same, batches), counts))
    return found[0], found[1], distance


def _by_window(values: Sequence[F64], batches: Sequence[Windows]) -> F64:
    """(windows,): sums over the scored tokens of each."""
    parts = [
        np.where(batch.scored, each.reshape(batch.scored.shape), 0.0).sum(axis=1)
        for each, batch in zip(values, batches, strict=True)
    ]
    return np.concatenate(parts)


def _estimate(sums: F64, counts: npt.NDArray[np.int64]) -> TokenMean:
    """Mean of a token, from sums and counts of windows."""
    n, total = len(sums), int(counts.sum())
    mean = float(sums.sum()) / total
    if n < 2:
        return TokenMean(mean, None)
    spread = float(((sums - mean * counts) ** 2).sum())
    return TokenMean(mean, math.sqrt(spread * n / (n - 1)) / total)
