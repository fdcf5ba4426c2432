"""open_adapter: what a LoRA adapter is made of, from its config and headers only.

Layout: adapter_config.json and adapter_model.safetensors (or .bin), as PEFT 0.21 saves them; its names are
`base_model.model.MODULE.lora_A.weight` and the like. Whatever cannot be folded or combined exactly is refused by name:
no tensor of the file and no setting of the config is ignored.

Source: peft 0.21.2, utils/save_and_load.py and tuners/lora/.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from merge.checkpoint.adapter_config import check_config, scaling_of
from merge.checkpoint.files import inside, read_json, weight_file
from merge.checkpoint.hub import locate
from merge.checkpoint.safetensors_file import read_header
from merge.errors import CheckpointError
from merge.plan import SourceFile, TensorRef
from merge.quoting import some
from merge.recipe.model import ModelRef

CONFIG = "adapter_config.json"
WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")

# MODULE.lora_A.weight, with the adapter's own name before .weight in files that PEFT did not write
_FACTOR = re.compile(r"(?P<module>.+)\.lora_(?P<part>[AB])(\.(?P<adapter>[^.]+))?\.weight")
_EMBEDDING = re.compile(r"(?P<module>.+)\.lora_embedding_(?P<part>[AB])(\.(?P<adapter>[^.]+))?")
_MAGNITUDE = re.compile(r"(?P<module>.+)\.lora_magnitude_vector(\.(?P<adapter>(?!weight$)[^.]+))?(?P<tail>\.weight)?")
_TOKENS = re.compile(r"(?P<module>.+)\.token_adapter\.trainable_tokens_delta(\.(?P<adapter>[^.]+))?")
_SAVED = re.compile(r"(?P<module>.+?)(\.modules_to_save(\.default)?|\.base_layer)?\.(?P<leaf>[^.]+)")


@dataclass(frozen=True)
class LoraModule:
    """The change of one matrix: scaling · B·A, and what DoRA makes of it.

    Attributes:
        name: of the module in the base model, e.g. "model.layers.0.self_attn.q_proj"; its matrix is `name`.weight.
        a: A, (rank, in); for an embedding (rank, vocabulary).
        b: B, (out, rank); for an embedding (width, rank).
        scaling: alpha / rank, or alpha / sqrt(rank) for rsLoRA.
        magnitude: DoRA's m: (out,), for an embedding (width,).
        embedding: the base's matrix has the vocabulary first: its change is scaling · (B·A)^T.
        fan_in_fan_out: the config says that matrices are stored (in, out), as GPT-2's Conv1D has them; False for
            embeddings.
    """

    name: str
    a: TensorRef
    b: TensorRef
    rank: int
    scaling: float
    magnitude: TensorRef | None = None
    embedding: bool = False
    fan_in_fan_out: bool = False


@dataclass(frozen=True)
class TokenRows:
    """Rows of an embedding that the adapter replaces: rows[i] is that of token indices[i] (trainable_token_indices)."""

    rows: TensorRef
    indices: tuple[int, ...]


@dataclass(frozen=True)
class Adapter:
    """A LoRA adapter.

    Attributes:
        ref: as the recipe names it.
        path: absolute path of its directory.
        revision: commit of an adapter from the hub.
        config: adapter_config.json.
        files: the weight file, as it was when its header was read.
        modules: base module name -> its change, in the file's order.
        saved: base tensor name -> the tensor that takes its place (modules_to_save, trained biases, saved embeddings).
        tokens: base tensor name -> rows of it that are replaced.
        notes: what was left out or chosen, for the user to know.
    """

    ref: ModelRef
    path: str
    revision: str | None
    config: dict[str, Any]
    files: tuple[SourceFile, ...]
    modules: Mapping[str, LoraModule]
    saved: Mapping[str, TensorRef]
    tokens: Mapping[str, TokenRows]
    notes: tuple[str, ...] = ()
    kind: str = "LORA"

    @property
    def base_name(self) -> str | None:
        """The base model that the config names."""
        name = self.config.get("base_model_name_or_path")
        return name if isinstance(name, str) and name else None


def is_adapter(directory: str) -> bool:
    """Whether a local directory holds an adapter and no whole model."""
    return os.path.isfile(os.path.join(directory, CONFIG)) and not os.path.isfile(
        os.path.join(directory, "config.json")
    )


def open_adapter(ref: ModelRef) -> Adapter:
    """Read config and header of an adapter; no tensor byte is read.

    Raises:
        CheckpointError: missing, damaged, not LoRA, or with something in it that has no exact meaning here.
    """
    place = locate(ref, adapter=True)
    config_path = inside(place.path, CONFIG)
    if not os.path.isfile(config_path):
        raise CheckpointError(
            f"{place.path}: is not an adapter: it has no {CONFIG}. Name what PEFT's save_pretrained wrote."
        )
    config = read_json(config_path, unique=False)
    check_config(config_path, config)
    path, file_notes = _weights(place.path)
    file = SourceFile.now(path)
    refs, notes = _read(path)
    modules, tokens, saved, more = _Sorter(config_path, path, config).sort(refs)
    if not modules and not saved and not tokens:
        raise CheckpointError(f"{path}: holds no tensors. Train the adapter, or download it again.")
    return Adapter(
        ref=ref,
        path=place.path,
        revision=place.revision,
        config=config,
        files=(file,),
        modules=modules,
        saved=saved,
        tokens=tokens,
        notes=(*place.notes, *file_notes, *notes, *more),
    )


def _weights(directory: str) -> tuple[str, tuple[str, ...]]:
    found = [name for name in WEIGHTS if os.path.lexists(os.path.join(directory, name))]
    if not found:
        raise CheckpointError(
            f"{directory}: has {CONFIG} but none of {', '.join(WEIGHTS)}. Download the adapter's weights again."
        )
    note = (f"{directory}: has {found[0]} and {found[1]}; {found[0]} is read",) if len(found) > 1 else ()
    return weight_file(directory, found[0]), note


def _read(path: str) -> tuple[list[TensorRef], list[str]]:
    if path.endswith(".safetensors"):
        return read_header(path)[0], []
    from merge.checkpoint.pickle_file import read_pickle  # seldom needed

    return read_pickle(path)


class _Sorter:
    """Every tensor of the file to its place, once."""

    def __init__(self, config_path: str, path: str, config: dict[str, Any]) -> None:
        self.config_path, self.path, self.config = config_path, path, config
        self.factors: dict[tuple[str, bool], dict[str, TensorRef]] = {}  # (module, is embedding) -> part -> tensor
        self.magnitudes: dict[str, TensorRef] = {}
        self.tokens: dict[str, TokenRows] = {}
        self.saved: dict[str, TensorRef] = {}
        self.adapters: dict[str | None, str] = {}
        self.notes: list[str] = []

    def sort(
        self, refs: list[TensorRef]
    ) -> tuple[dict[str, LoraModule], dict[str, TokenRows], dict[str, TensorRef], list[str]]:
        for ref in refs:
            self._place(ref, ref.name.removeprefix("base_model.model."))
        if len(self.adapters) > 1:
            raise self._wrong(
                f"holds several adapters ({some(sorted(str(name) for name in self.adapters))}), as in "
                f"{some(list(self.adapters.values()))}. Save each on its own"
            )
        modules = {name: self._module(name, embedding, parts) for (name, embedding), parts in self.factors.items()}
        if len(modules) != len(self.factors):
            twice = sorted({name for name, kind in self.factors if (name, not kind) in self.factors})
            raise self._wrong(f"{some(twice)}: has both lora_A and lora_embedding_A")
        if self.magnitudes:
            orphans = [ref.name for ref in self.magnitudes.values()]
            raise self._wrong(f"{some(orphans)}: has no lora_A and lora_B beside it")
        return modules, self.tokens, self.saved, self.notes

    def _place(self, ref: TensorRef, name: str) -> None:
        for pattern in (_FACTOR, _EMBEDDING, _MAGNITUDE, _TOKENS):
            match = pattern.fullmatch(name)
            if match is None:
                continue
            module = match["module"]
            if ".lora_" in module or module.endswith(".base_layer"):
                raise self._wrong(
                    f"{ref.name}: an adapter on a parameter (target_parameters), not on a module, which cannot be "
                    "folded here. Fold it with PEFT's merge_and_unload"
                )
            self.adapters.setdefault(match["adapter"], ref.name)
            if pattern is _MAGNITUDE:
                self._magnitude(module, ref, is_long=match["tail"] is not None)
            elif pattern is _TOKENS:
                self._rows(module, ref)
            else:
                self._factor((module, pattern is _EMBEDDING), match["part"], ref)
            return
        self._whole(ref, name)

    def _factor(self, key: tuple[str, bool], part: str, ref: TensorRef) -> None:
        parts = self.factors.setdefault(key, {})
        if part in parts:
            raise self._wrong(f"{ref.name} and {parts[part].name} are the same factor. Remove one of them")
        if len(ref.shape) != 2 or 0 in ref.shape:
            kind = "a convolution's, which cannot be folded here" if len(ref.shape) > 2 else "not a matrix"
            raise self._wrong(
                f"{ref.name}: shape {list(ref.shape)} is {kind}. An empty or flat factor was saved before its shards "
                "were gathered"
            )
        parts[part] = ref

    def _magnitude(self, module: str, ref: TensorRef, is_long: bool) -> None:
        known = self.magnitudes.get(module)
        if known is not None:
            # PEFT writes an embedding's magnitude under two names, and when it loads them the longer one wins.
            longer, shorter = (ref, known) if is_long else (known, ref)
            if not longer.name.endswith(".weight") or shorter.name.endswith(".weight") or ref.shape != known.shape:
                raise self._wrong(f"{ref.name} and {known.name} are the same magnitude. Remove one of them")
            self.notes.append(f"{self.path}: {longer.name} and {shorter.name} are one; the first is read, as PEFT does")
            ref = longer
        self.magnitudes[module] = ref

    def _rows(self, module: str, ref: TensorRef) -> None:
        wanted = self.config.get("trainable_token_indices")
        if isinstance(wanted, Mapping):
            wanted = next((ids for key, ids in wanted.items() if f".{module}".endswith(f".{key}")), None)
        if not isinstance(wanted, list) or not all(type(token) is int and token >= 0 for token in wanted):
            raise self._wrong(f"{ref.name}: {self.config_path} has no trainable_token_indices for this embedding")
        if len(ref.shape) != 2 or ref.shape[0] != len(wanted) or len(set(wanted)) != len(wanted):
            raise self._wrong(
                f"{ref.name}: expected one row for each of the {len(wanted)} different trainable_token_indices of "
                f"{self.config_path}, found shape {list(ref.shape)}"
            )
        self.tokens[f"{module}.weight"] = TokenRows(ref, tuple(wanted))

    def _whole(self, ref: TensorRef, name: str) -> None:
        match = _SAVED.fullmatch(name)
        if ".lora_" in name or "token_adapter" in name or match is None:
            hint = " (lora_bias)" if name.endswith(".bias") and ".lora_" in name else ""
            raise self._wrong(
                f"{ref.name}: a part of an adapter{hint} that is not known here, so it cannot be folded exactly. "
                "Fold it with PEFT's merge_and_unload"
            )
        target = f"{match['module']}.{match['leaf']}"
        if target in self.saved:
            raise self._wrong(f"{ref.name} and {self.saved[target].name} are both {target}. Remove one of them")
        self.saved[target] = ref

    def _module(self, name: str, embedding: bool, parts: dict[str, TensorRef]) -> LoraModule:
        if set(parts) != {"A", "B"}:
            (there,) = parts
            raise self._wrong(f"{parts[there].name}: has no lora_{'B' if there == 'A' else 'A'} beside it")
        a, b = parts["A"], parts["B"]
        rank, scaling = scaling_of(self.config_path, self.config, name)
        if a.shape[0] != rank or b.shape[1] != rank:
            raise self._wrong(
                f"{name}: expected rank {rank} as {CONFIG} says (r and rank_pattern), found lora_A {list(a.shape)} and "
                f"lora_B {list(b.shape)}. Config and weights are of different adapters"
            )
        magnitude = self.magnitudes.pop(name, None)
        use_dora = bool(self.config.get("use_dora"))
        if (magnitude is not None) != use_dora:
            state = "has a" if magnitude is not None else "has no"
            raise self._wrong(f"{name}: {state} lora_magnitude_vector, but use_dora is {use_dora} in {CONFIG}")
        if magnitude is not None and math.prod(magnitude.shape) != b.shape[0]:
            raise self._wrong(f"{magnitude.name}: expected {b.shape[0]:,} values, found shape {list(magnitude.shape)}")
        transposed = bool(self.config.get("fan_in_fan_out")) and not embedding
        return LoraModule(name, a, b, rank, scaling, magnitude, embedding, transposed)

    def _wrong(self, what: str) -> CheckpointError:
        return CheckpointError(f"{self.path}: {what}.")
