"""Opens lm-eval's models, from directories or on servers.

Those that transformers runs are loaded through merge.loading: complete, and without untrusted code.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from eval.models import Subject, check_files
from eval.quiet import quietly
from eval.settings import Settings
from merge.errors import MergeError, UsageError, first_line
from merge.loading import FLAG, permission, refusal
from merge.loading import load_model as load_pretrained
from merge.schema.names import suggest

if TYPE_CHECKING:
    from lm_eval.api.model import LM
    from torch.nn import Module
    from transformers import PreTrainedModel

_SMALL = 20_000_000  # parameters


def load_model(path: Path, settings: Settings) -> LM:
    """lm-eval's model of a directory.

    Raises:
        MergeError: a backend that is not installed, or a model that it cannot load.
    """
    from lm_eval.api.registry import get_model, model_registry

    try:
        kind = get_model(settings.backend)
    except (ValueError, KeyError):
        near = suggest(settings.backend, sorted(model_registry))
        raise UsageError(f"--backend {settings.backend}: lm-eval has no backend of that name; {near}") from None
    arguments: dict[str, object] = dict(settings.model_args)
    if "trust_remote_code" in arguments:
        raise UsageError(f"--model-args trust_remote_code: name the models whose code may run: {FLAG} MODEL.")
    if settings.backend == "hf":
        arguments |= {"pretrained": str(path), "dtype": settings.used_dtype}
    elif settings.backend == "vllm":
        arguments |= {"pretrained": str(path), "dtype": settings.dtype or "auto"}
    else:
        arguments.setdefault("pretrained", str(path))
    if permission(str(path)):
        arguments["trust_remote_code"] = True
    try:
        with quietly():
            model = _checked(kind).create_from_arg_obj(
                arguments, {"batch_size": settings.batch_size or _batch_size(settings), "device": settings.device}
            )
    except Exception as error:  # backends raise what they like
        check_files(path)
        if isinstance(error, MergeError):
            raise
        raise refusal(str(path), error) or MergeError(
            f"{path}: {settings.backend} cannot load it: {type(error).__name__}: {first_line(error)}"
        ) from error
    if settings.backend == "hf" and settings.device == "cpu":
        _one_thread_if_small(model.model)
    return model


def _checked(kind: type[LM]) -> type[LM]:
    """A model type of lm-eval; types that load with transformers do so through merge.loading."""
    from lm_eval.models.huggingface import HFLM

    if not issubclass(kind, HFLM):
        return kind

    def create(self: Any, *arguments: object, **keywords: object) -> None:
        """Loads as HFLM does, through the class in one of its attributes; `_Loader` replaces it meanwhile."""
        before = self.AUTO_MODEL_CLASS
        self.AUTO_MODEL_CLASS = _Loader(before.__name__)
        try:
            kind._create_model(self, *arguments, **keywords)
        finally:
            self.AUTO_MODEL_CLASS = before

    return type(kind.__name__, (kind,), {"_create_model": create})


class _Loader:
    def __init__(self, kind: str) -> None:
        self._kind = kind

    def from_pretrained(self, path: str, *, trust_remote_code: bool | None = None, **settings: Any) -> PreTrainedModel:
        """Like transformers' own; whether code may run has been decided before."""
        given = {name: value for name, value in settings.items() if value not in (None, "")}
        return load_pretrained(self._kind, path, **given).network


def _one_thread_if_small(model: Module) -> None:
    """Matrices of tiny models are not worth sharing: threads that wait for each other can take 15 times as long."""
    import torch

    if sum(parameter.numel() for parameter in model.parameters()) < _SMALL:
        torch.set_num_threads(1)


def _batch_size(settings: Settings) -> int | str:
    # On a GPU lm-eval finds the largest that fits. On CPU larger batches gain nothing, and padding costs time.
    return "auto" if settings.device.startswith("cuda") and settings.backend in ("hf", "vllm") else 8


def fingerprint_of(subject: Subject, load: Callable[[], LM]) -> list[object]:
    """Raises MergeError if the server does not answer."""
    from eval.model_proxy import fingerprint

    try:
        with quietly():
            return fingerprint(load)
    except MergeError:
        raise
    except Exception as error:  # backends raise what they like
        raise MergeError(
            f"{subject.name}: the server does not answer ({_said(error)}). Name it with --model-args base_url=..."
        ) from error


def _said(error: Exception) -> str:
    return f"{type(error).__name__}: {first_line(error)}"
