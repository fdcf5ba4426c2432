"""Settings of an evaluation, the same for all compared models."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path


@dataclass(frozen=True)
class Settings:
    """
    Attributes:
        backend: lm-eval's name of a model type; "hf" loads a directory with transformers.
        model_args: further arguments of that type, in lm-eval's words.
        dtype: of weights and arithmetic; None: float32 on a CPU (bf16 is slow on most), else as stored.
        batch_size: sequences at once; 0: found automatically.
        limit: items of each task, drawn once by `seed` and then the same for every model; None: all.
        holdout, held_out: the share of each task's items set aside, drawn by `seed`, and the part evaluated.
        chat_template: whether prompts are wrapped in the model's chat template.
    """

    backend: str = "hf"
    model_args: Mapping[str, object] = field(default_factory=dict)
    device: str = "cpu"
    dtype: str | None = None
    batch_size: int = 0
    num_fewshot: int | None = None
    limit: int | None = None
    seed: int = 0
    holdout: float = 0.0
    held_out: bool = False
    chat_template: bool = False
    system_instruction: str | None = None
    include: Path | None = None
    unsafe_code: bool = False

    @property
    def used_dtype(self) -> str:
        return self.dtype or ("float32" if self.device == "cpu" else "auto")

    def of_numbers(self) -> dict[str, object]:
        """The settings that change a request's numbers; the rest of a request is in its text."""
        return {
            "backend": self.backend,
            "dtype": self.used_dtype,
            "device": self.device.partition(":")[0],
            **dict(self.model_args),
        }
