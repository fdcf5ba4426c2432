"""A stand-in for lm-eval's model: returns stored answers, and loads the real model only for the rest."""

from __future__ import annotations

import math
import secrets
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

from lm_eval.api.instance import Instance
from lm_eval.api.model import LM, CacheHook

from eval.memory import Memory, request_key
from merge.errors import NumbersError, UsageError
from merge.quoting import quoted

Tick = Callable[[int], None]  # requests answered since the last call


class RememberingLM(LM):  # type: ignore[misc]
    """An lm-eval model that is loaded when a request has no answer yet, and whose answers are stored as they come."""

    def __init__(
        self,
        load: Callable[[], LM],
        memory: Memory,
        digest: str,
        settings: Mapping[str, object],
        unchanged: Callable[[], None],
    ) -> None:
        """
        Args:
            load: makes the real model.
            digest, settings: parts of every request's key, see eval.memory.
            unchanged: raises SourceChanged if the files are no longer those of the digest.
        """
        super().__init__()
        self._load, self._memory, self.digest, self._settings = load, memory, digest, settings
        self._unchanged = unchanged
        self._loaded: LM | None = None
        self.tick: Tick = lambda n: None
        self.asked = self.remembered = 0  # requests

    @property
    def inner(self) -> LM:
        """The real model, loaded now if it is not yet."""
        if self._loaded is None:
            self._loaded = self._load()
            self._unchanged()
            self._loaded.set_cache_hook(_Recorder(self))
        return self._loaded

    def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
        return [(value, greedy) for value, greedy in self._answer("loglikelihood", requests)]

    def loglikelihood_rolling(self, requests: list[Instance]) -> list[float]:
        return self._answer("loglikelihood_rolling", requests)

    def generate_until(self, requests: list[Instance]) -> list[str]:
        return self._answer("generate_until", requests)

    def token_log_probabilities(self, requests: list[Instance]) -> list[list[float]]:
        """log p of every token of each text, in nats, which loglikelihood_rolling adds up. With the backend hf only."""
        keys = [self.key("token_log_probabilities", request.args) for request in requests]
        known = self._memory.answers(keys)
        for key, request in zip(keys, requests, strict=True):
            if key not in known:
                known[key] = _token_log_probabilities(self.inner, str(request.args[0]))
                self._check(request, sum(known[key]))
                self._store(key, known[key])
                self.asked += 1
            else:
                self.remembered += 1
        return [known[key] for key in keys]

    def release(self) -> None:
        """Frees the real model; it is loaded again when needed."""
        self._loaded = None

    def _answer(self, kind: str, requests: Sequence[Instance]) -> list[Any]:
        keys = [self.key(kind, request.args) for request in requests]
        known = {} if any(map(_is_sampled, requests)) else self._memory.answers(keys)
        # Equal requests are sent once; lm-eval repeats them for groups that share a task.
        missing = {key: request for key, request in zip(keys, requests, strict=True) if key not in known}
        if any(map(_is_sampled, requests)):
            self.tick(0)
            return list(getattr(self.inner, kind)(list(requests), disable_tqdm=True))
        self.remembered += len(requests) - len(missing)
        self.asked += len(missing)
        self.tick(len(requests) - len(missing))
        if missing:
            with _refusing_nan(self.inner, next(iter(missing.values()))) if kind == "generate_until" else nullcontext():
                answers = getattr(self.inner, kind)(list(missing.values()), disable_tqdm=True)
            for (key, request), answer in zip(missing.items(), answers, strict=True):
                self._check(request, answer)
                known[key] = answer
                self._store(key, answer)
        return [known[key] for key in keys]

    def key(self, kind: str, arguments: Sequence[object]) -> bytes:
        return request_key(self.digest, self._settings, kind, arguments)

    def record(self, kind: str, arguments: Sequence[object], answer: object) -> None:
        """Stores one answer as soon as the real model has it."""
        if not _is_nan(answer):
            self._store(self.key(kind, arguments), answer)
        self.tick(1)

    def _store(self, key: bytes, answer: object) -> None:
        self._unchanged()  # weights may be read from the file only on use
        self._memory.store(key, answer)

    def _check(self, request: Instance, answer: object) -> None:
        if _is_nan(answer):
            raise _nan(request, f" for {quoted(str(request.args[0])[-60:])}")

    # Other calls by lm-eval; only chat templates need the real model.

    @property
    def tokenizer_name(self) -> str:
        return str(self.inner.tokenizer_name)

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        found: str | None = self.inner.chat_template(chat_template)
        return found

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        try:
            return str(self.inner.apply_chat_template(chat_history, add_generation_prompt=add_generation_prompt))
        except ValueError as error:
            if getattr(getattr(self.inner, "tokenizer", None), "chat_template", "") is None:
                raise UsageError("--chat-template: the model has none. Leave the option out.") from error
            raise


_PROBES = (
    ("The quick brown fox", " jumps over the lazy dog, and the cat sleeps in the sun."),
    ("1 + 1 =", " 2, 2 + 2 = 4, 3 + 5 = 8 and 7 * 6 = 42."),
)


def fingerprint(load: Callable[[], LM]) -> list[object]:
    """Identifies a model behind a server: its log-likelihoods of two texts, to the last bit.

    A random number if the server gives none, so that later runs do not reuse its answers.
    """
    model = load()
    asked = [Instance("loglikelihood", {}, probe, 0) for probe in _PROBES]
    try:
        return [list(answer) for answer in model.loglikelihood(asked, disable_tqdm=True)]
    except NotImplementedError:
        return [secrets.token_hex()]


def _token_log_probabilities(model: LM, text: str) -> list[float]:
    """Window by window, as HFLM.loglikelihood_rolling reads a text. Raises UsageError for other backends."""
    import torch
    from lm_eval import utils

    inner: Any = model
    if not hasattr(inner, "_model_call"):
        raise UsageError("--ensemble: perplexities need --backend hf, which gives the probability of every token.")
    windows = utils.get_rolling_token_windows(
        token_list=inner.tok_encode(text),
        prefix_token=inner.prefix_token_id,
        max_seq_len=inner.max_length,
        context_len=1,
    )
    found: list[float] = []
    for context, continuation in map(utils.make_disjoint_window, windows):
        tokens = torch.tensor([(context + continuation)[-(inner.max_length + 1) :]], device=inner.device)
        logits = inner._model_call(tokens[:, :-1])[0, -len(continuation) :].float().log_softmax(-1)
        found += logits.gather(1, tokens[0, -len(continuation) :, None])[:, 0].tolist()
    return found


class _Recorder(CacheHook):  # type: ignore[misc]
    """lm-eval calls it with each answer, long before a task is finished."""

    def __init__(self, model: RememberingLM) -> None:
        super().__init__(None)
        self._model = model

    def add_partial(self, attr: str, req: Sequence[object], res: object) -> None:
        self._model.record(attr, req, res)


@contextmanager
def _refusing_nan(model: LM, request: Instance) -> Iterator[None]:
    """Generated text hides NaN, so the logits are checked if there is a torch model."""
    inner: Any = getattr(model, "model", None)
    if not hasattr(inner, "register_forward_hook"):
        yield
        return

    def look(module: object, given: object, output: object) -> None:
        logits = getattr(output, "logits", None)
        if logits is not None and bool(logits[:, -1].isnan().any()):
            raise _nan(request, "")

    handle = inner.register_forward_hook(look)
    try:
        yield
    finally:
        handle.remove()


def _nan(request: Instance, where: str) -> NumbersError:
    return NumbersError(
        f"{request.task_name}: the model gives NaN{where}. Its weights hold NaN or overflow in this dtype: try --dtype "
        "float32, and look at the model with merge diff."
    )


def _is_sampled(request: Instance) -> bool:
    """Whether an answer is drawn at random, so that it must not be remembered."""
    return request.request_type == "generate_until" and bool(request.args[1].get("do_sample", False))


def _is_nan(answer: object) -> bool:
    number = answer[0] if isinstance(answer, (tuple, list)) else answer
    return isinstance(number, float) and math.isnan(number)
