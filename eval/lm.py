"""lm-eval's transformers models, loaded through merge.loading: complete, and without untrusted code."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lm_eval.api.model import LM
from lm_eval.models.huggingface import HFLM

from merge.loading import load_model

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def checked(kind: type[LM]) -> type[LM]:
    """A model type of lm-eval; types that load with transformers do so through merge.loading."""
    return type(kind.__name__, (_Checked, kind), {}) if issubclass(kind, HFLM) else kind


class _Checked(HFLM):  # type: ignore[misc]  # lm_eval is not followed
    """HFLM loads through the class in one of its attributes, which `_Loader` replaces meanwhile."""

    AUTO_MODEL_CLASS: Any

    def _create_model(self, *arguments: object, **keywords: object) -> None:
        kind = self.AUTO_MODEL_CLASS
        self.AUTO_MODEL_CLASS = _Loader(kind.__name__)
        try:
            super()._create_model(*arguments, **keywords)
        finally:
            self.AUTO_MODEL_CLASS = kind


class _Loader:
    def __init__(self, kind: str) -> None:
        self._kind = kind

    def from_pretrained(self, path: str, *, trust_remote_code: bool | None = None, **settings: Any) -> PreTrainedModel:
        """Like transformers' own; whether code may run has been decided before."""
        given = {name: value for name, value in settings.items() if value not in (None, "")}
        return load_model(self._kind, path, **given).network
