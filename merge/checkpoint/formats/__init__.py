"""Formats of quantised weights, one file each: it recognises the format and makes sources that decode its tensors.

A format consists of a file here, which implements QuantizedFormat, and one operation of merge/sources. Adding the files
adds the format.
"""

from __future__ import annotations

import importlib
import os
import pkgutil
from collections.abc import Iterator, Mapping
from typing import Any, Protocol, cast

from merge.checkpoint.files import inside, read_json
from merge.errors import CheckpointError
from merge.plan import TensorRef
from merge.quoting import clipped, some

Tensors = Mapping[str, TensorRef]
Quantization = Mapping[str, Any]  # quantization_config of config.json
_AUTOGPTQ = "quantize_config.json"
_PACKED = (".qweight", ".weight_packed", ".W_q")
_NOT_READ = {
    "torchao": "its tensors are objects of torchao, whose layouts change with its versions",
    "hqq": "its settings are stored as tensors, and halves of a matrix share bytes",
    "quanto": "its tensors are objects of optimum-quanto",
    "aqlm": "codebooks of additive quantisation",
    "vptq": "codebooks of vectors",
    "quip": "weights are stored rotated",
    "higgs": "weights are stored rotated",
    "spqr": "outliers are stored apart",
    "eetq": "rows are in an order for one kind of GPU",
    "bitnet": "weights are ternary, packed for its own kernels",
}


class QuantizedFormat(Protocol):
    NAME: str  # for messages

    def recognises(self, quantization: Quantization | None, tensors: Tensors) -> bool:
        """Whether a model has this format; most declare it in their config."""

    def sources(
        self, path: str, quantization: Quantization | None, tensors: Tensors
    ) -> tuple[dict[str, TensorRef], tuple[str, ...]]:
        """The model's tensors, in the same order, and notes, which do not name the model.

        Args:
            path: the model's directory, for messages.
            tensors: every tensor of the files.

        Raises:
            CheckpointError: scales or similar parts of a weight are missing or do not fit.
        """


def decoded(path: str, config: Mapping[str, object], tensors: Tensors) -> tuple[dict[str, TensorRef], tuple[str, ...]]:
    """The tensors of a model as sources with plain values, whatever their format, and notes.

    Raises:
        CheckpointError: quantised in a way that is not read.
    """
    quantization = quantization_of(config) or _of_autogptq(path)
    known = list(_formats())
    for each in known:
        if each.recognises(quantization, tensors):
            return each.sources(path, quantization, tensors)
    if quantization is None:
        packed = [name for name in tensors if name.endswith(_PACKED)]
        if packed:
            raise CheckpointError(
                f"{tensors[packed[0]].file}: {some(packed)}: packed weights, but config.json has no "
                "quantization_config, which says what they mean. Copy config.json from the model's page."
            )
        return dict(tensors), ()
    method = quant_method(config) or ""
    why = f" ({_NOT_READ[method]})" if method in _NOT_READ else ""
    raise CheckpointError(
        f"{path}/config.json: quantization_config: weights quantised by {clipped(method)} are not read{why}; expected "
        f"{', '.join(each.NAME for each in known)} or none. Dequantise the model first (to bf16), or name the original."
    )


def _formats() -> Iterator[QuantizedFormat]:
    for module in pkgutil.iter_modules(__path__):
        yield cast(QuantizedFormat, importlib.import_module(f"{__name__}.{module.name}"))


def _of_autogptq(path: str) -> Quantization | None:
    """What AutoGPTQ wrote into a file of its own, before config.json had a place for it."""
    if not os.path.isfile(os.path.join(path, _AUTOGPTQ)):
        return None
    return {"quant_method": "gptq"} | read_json(inside(path, _AUTOGPTQ), unique=False)


def quant_method(config: Mapping[str, object]) -> str | None:
    """What a model's weights are quantised with, as its config says (bitsandbytes, fp8 ...); None if they are not."""
    found = quantization_of(config)
    return None if found is None else str(found.get("quant_method", "unknown"))


def quantization_of(config: Mapping[str, object]) -> Quantization | None:
    """Its quantization_config, wherever it lies; None if it has none."""
    nested = config.get("text_config")
    for place in (config, nested if isinstance(nested, Mapping) else {}):
        for key in ("quantization_config", "compression_config"):
            value = place.get(key)
            if isinstance(value, Mapping) and value:
                return value
    return None
