"""The tensors of an adapter file, sorted: factors, whole tensors, rows of tokens, each to its module, once.

Source: peft 0.21.2, utils/save_and_load.py and tuners/lora/.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from typing import Any

from merge.adapter_kinds import KINDS, find_kind
from merge.adapters.config import scaling_of
from merge.adapters.parts import (
    AdapterTensors,
    LoraModule,
    OtherModule,
    ParameterFactors,
    TokenRows,
)
from merge.checkpoint.files import ADAPTER_CONFIG
from merge.errors import CheckpointError
from merge.plan import TensorRef
from merge.quoting import quoted, some

# MODULE.lora_A.weight, with the adapter's own name before .weight in files that PEFT did not write
_FACTOR = re.compile(r"(?P<module>.+)\.lora_(?P<part>[AB])(\.(?P<adapter>[^.]+))?\.(?P<leaf>weight|bias)")
_EMBEDDING = re.compile(r"(?P<module>.+)\.lora_embedding_(?P<part>[AB])(\.(?P<adapter>[^.]+))?")
_MAGNITUDE = re.compile(r"(?P<module>.+)\.lora_magnitude_vector(\.(?P<adapter>(?!weight$)[^.]+))?(?P<tail>\.weight)?")
_TOKENS = re.compile(r"(?P<module>.+?)(\.token_adapter)?\.trainable_tokens_delta(\.(?P<adapter>[^.]+))?")
_SAVED = re.compile(
    r"(?P<module>.+?)\.((?P<infix>modules_to_save(\.default)?|original_module|ln_tuning_layers|(token_adapter\.)?base_layer)\.)?"
    r"(?P<leaf>[^.]+)"
)
# prefixes of adapters' own tensors
_PARTS = (
    "lora token_adapter trainable_tokens ia3 hada lokr oft boft hra vera vblora fourierft miss c3a delora hira road"
)
_OF_ADAPTERS = re.compile(rf"(^|\.)({'|'.join(_PARTS.split())})(_|$|\.)")


def sort_tensors(
    config_path: str, path: str, config: Mapping[str, object], refs: Iterable[TensorRef]
) -> AdapterTensors:
    """Assigns every tensor of an adapter's file to its module.

    Raises:
        CheckpointError: a tensor without a known place, or several for one.
    """
    sorter = _Lora(config_path, path, config) if config["peft_type"] not in KINDS else _Other(config_path, path, config)
    for ref in refs:
        sorter.place(ref, ref.name.removeprefix("base_model.model."))
    return sorter.finish()


class _Sorter:
    """The parts that all kinds may have: whole tensors and rows of tokens."""

    def __init__(self, config_path: str, path: str, config: Mapping[str, object]) -> None:
        self.config_path, self.path, self.config = config_path, path, config
        self.found = AdapterTensors()
        self.names: dict[str | None, str] = {}  # of adapters in the file -> a tensor that has it
        self._originals: dict[str, TensorRef] = {}  # what modules_to_save took the place of

    def place(self, ref: TensorRef, name: str) -> None:
        match = _TOKENS.fullmatch(name)
        if match is not None:
            self.names.setdefault(match["adapter"], ref.name)
            self._rows(match["module"], ref)
        else:
            self._whole(ref, name)

    def finish(self) -> AdapterTensors:
        if len(self.names) > 1:
            raise self.wrong(
                f"holds several adapters ({some(sorted(str(name) for name in self.names))}), as in "
                f"{some(list(self.names.values()))}. Save each on its own"
            )
        for target, ref in self._originals.items():
            if target not in self.found.saved:
                raise self.wrong(f"{ref.name}: the tensor that replaces it (modules_to_save) is not in the file")
        return self.found

    def wrong(self, what: str) -> CheckpointError:
        return CheckpointError(f"{self.path}: {what}.")

    def _rows(self, module: str, ref: TensorRef) -> None:
        wanted = self.config.get("trainable_token_indices") or self.config.get("token_indices")
        if isinstance(wanted, Mapping):
            wanted = next((ids for key, ids in wanted.items() if f".{module}".endswith(f".{key}")), None)
        if not isinstance(wanted, list) or not all(type(token) is int and token >= 0 for token in wanted):
            raise self.wrong(f"{ref.name}: {self.config_path} has no trainable_token_indices for this embedding")
        if len(ref.shape) != 2 or ref.shape[0] != len(wanted) or len(set(wanted)) != len(wanted):
            raise self.wrong(
                f"{ref.name}: expected one row for each of the {len(wanted)} different trainable_token_indices of "
                f"{self.config_path}, found shape {list(ref.shape)}"
            )
        self.found.tokens[f"{module}.weight"] = TokenRows(ref, tuple(wanted))

    def _whole(self, ref: TensorRef, name: str) -> None:
        match = _SAVED.fullmatch(name)
        if match is None or _OF_ADAPTERS.search(f"{match['module']}.{match['leaf']}"):
            raise self.wrong(
                f"{ref.name}: a part of an adapter that is not known here, so it cannot be folded exactly. "
                "Fold it with PEFT's merge_and_unload"
            )
        target = f"{match['module']}.{match['leaf']}"
        known = self.found.saved.get(target)
        if match["infix"] == "original_module":
            self._originals[target] = ref
        elif known is None:
            self.found.saved[target] = ref
        elif ".modules_to_save." in known.name + ref.name and (known.shape, known.dtype) == (ref.shape, ref.dtype):
            # PEFT writes a resized embedding or head whole, and under the name of modules_to_save once more
            self.found.saved[target] = ref if ".modules_to_save." in known.name else known
        else:
            raise self.wrong(f"{ref.name} and {known.name} are both {target}. Remove one of them")


class _Other(_Sorter):
    """A kind of merge.adapter_kinds: the tensors of a module by the names that the kind gives them."""

    def __init__(self, config_path: str, path: str, config: Mapping[str, Any]) -> None:
        super().__init__(config_path, path, config)
        kind = find_kind(config["peft_type"])
        ends = "|".join(kind.parts)
        self._part = re.compile(rf"(?P<module>.+)\.(?P<part>{ends})(\.(?P<adapter>(?!weight$)[^.]+))?(\.weight)?")
        # written beside the model: base_model.vera_A
        shared = "|".join(kind.shared) or "(?!)"
        self._shared_name = re.compile(rf"base_model\.(?P<part>{shared})(\.(?P<adapter>[^.]+))?")
        self._modules: dict[str, dict[str, TensorRef]] = {}
        self._shared: dict[str, TensorRef] = {}

    def place(self, ref: TensorRef, name: str) -> None:
        shared, match = self._shared_name.fullmatch(name), self._part.fullmatch(name)
        if shared is not None:
            self._put(self._shared, shared["part"], ref)
        elif match is not None:
            self.names.setdefault(match["adapter"], ref.name)
            self._put(self._modules.setdefault(match["module"], {}), match["part"], ref)
        else:
            super().place(ref, name)

    def finish(self) -> AdapterTensors:
        for name, parts in self._modules.items():
            self.found.others[name] = OtherModule(name, parts | self._shared)
        return super().finish()

    def _put(self, parts: dict[str, TensorRef], part: str, ref: TensorRef) -> None:
        if part in parts:
            raise self.wrong(f"{ref.name} and {parts[part].name} are the same part. Remove one of them")
        parts[part] = ref


class _Lora(_Sorter):
    """LoRA, and kinds that consist of whole tensors or rows of tokens."""

    def __init__(self, config_path: str, path: str, config: Mapping[str, object]) -> None:
        super().__init__(config_path, path, config)
        self.factors: dict[tuple[str, bool], dict[str, TensorRef]] = {}  # (module, is embedding) -> part -> tensor
        self.magnitudes: dict[str, TensorRef] = {}

    def place(self, ref: TensorRef, name: str) -> None:
        for pattern in (_FACTOR, _EMBEDDING, _MAGNITUDE):
            match = pattern.fullmatch(name)
            if match is None:
                continue
            module = match["module"]
            self.names.setdefault(match["adapter"], ref.name)
            if pattern is _MAGNITUDE:
                self._magnitude(module, ref, is_long=match["tail"] is not None)
            elif pattern is _FACTOR and match["leaf"] == "bias":
                if match["part"] == "A" or not self.config.get("lora_bias"):
                    raise self.wrong(
                        f"{ref.name}: a bias inside a factor, but lora_bias is not set in {ADAPTER_CONFIG}"
                    )
                self._put((module, False), "bias", ref)
            else:
                self._factor((module, pattern is _EMBEDDING), match["part"], ref)
            return
        super().place(ref, name)

    def finish(self) -> AdapterTensors:
        both = sorted({name for name, kind in self.factors if (name, not kind) in self.factors})
        for (name, embedding), parts in self.factors.items():
            if not {"A", "B"} <= set(parts):
                (there,) = set(parts) - {"bias"} or {"bias"}
                raise self.wrong(f"{parts[there].name}: has no lora_{'B' if there == 'A' else 'A'} beside it")
            if not embedding and self._is_parameter(name, parts["A"]):
                module = name.removesuffix(".base_layer" * name.count(".base_layer"))
                depth = name.count(".base_layer")
                self.found.parameters[name] = ParameterFactors(module, depth, parts["A"], parts["B"])
            else:
                self.found.modules[name] = self._module(name, embedding, parts)
        if both:
            raise self.wrong(f"{some(both)}: has both lora_A and lora_embedding_A")
        if self.magnitudes:
            orphans = [ref.name for ref in self.magnitudes.values()]
            raise self.wrong(f"{some(orphans)}: has no lora_A and lora_B beside it")
        return super().finish()

    def _is_parameter(self, name: str, a: TensorRef) -> bool:
        """Whether factors belong to a parameter (target_parameters) rather than a module."""
        if name.endswith(".base_layer"):
            return True
        wanted = self.config.get("target_parameters") or ()
        if not isinstance(wanted, (list, tuple)) or not all(isinstance(key, str) for key in wanted):
            raise self.wrong(f"{self.config_path}: target_parameters: expected a list of names, found {quoted(wanted)}")
        if any(f".{name}".endswith(f".{key.rpartition('.')[0]}") for key in wanted if "." in key):
            return True
        rank, _ = self._scaling(name)
        return bool(wanted) and a.shape[0] != rank and a.shape[0] % rank == 0

    def _factor(self, key: tuple[str, bool], part: str, ref: TensorRef) -> None:
        if len(ref.shape) < 2 or 0 in ref.shape:
            raise self.wrong(
                f"{ref.name}: shape {list(ref.shape)} is not a matrix. An empty or flat factor was saved before its "
                "shards were gathered"
            )
        self._put(key, part, ref)

    def _put(self, key: tuple[str, bool], part: str, ref: TensorRef) -> None:
        parts = self.factors.setdefault(key, {})
        if part in parts:
            raise self.wrong(f"{ref.name} and {parts[part].name} are the same factor. Remove one of them")
        parts[part] = ref

    def _magnitude(self, module: str, ref: TensorRef, is_long: bool) -> None:
        known = self.magnitudes.get(module)
        if known is not None:
            # PEFT writes an embedding's magnitude under two names, and when it loads them the longer one wins.
            longer, shorter = (ref, known) if is_long else (known, ref)
            if not longer.name.endswith(".weight") or shorter.name.endswith(".weight") or ref.shape != known.shape:
                raise self.wrong(f"{ref.name} and {known.name} are the same magnitude. Remove one of them")
            said = f"{self.path}: {longer.name} and {shorter.name} are one; the first is read, as PEFT does"
            self.found.notes.append(said)
            ref = longer
        self.magnitudes[module] = ref

    def _scaling(self, name: str) -> tuple[int, float]:
        try:
            return scaling_of(self.config, name)
        except ValueError as error:
            raise CheckpointError(f"{self.config_path}: {error}.") from None

    def _module(self, name: str, embedding: bool, parts: dict[str, TensorRef]) -> LoraModule:
        a, b, bias = parts["A"], parts["B"], parts.get("bias")
        rank, scaling = self._scaling(name)
        if a.shape[0] != rank or b.shape[1] != rank:
            raise self.wrong(
                f"{name}: expected rank {rank} as {ADAPTER_CONFIG} says (r and rank_pattern), found "
                f"lora_A {list(a.shape)} and lora_B {list(b.shape)}. Config and weights are of different adapters"
            )
        if math.prod(b.shape[2:]) != 1:
            raise self.wrong(f"{b.name}: expected a convolution of one point, found shape {list(b.shape)}")
        if (bias is not None) != bool(self.config.get("lora_bias")):
            raise self.wrong(f"{name}: has no lora_B.bias, but lora_bias is True in {ADAPTER_CONFIG}")
        if bias is not None and bias.shape != (b.shape[0],):
            raise self.wrong(f"{bias.name}: expected {b.shape[0]:,} values, found shape {list(bias.shape)}")
        magnitude = self.magnitudes.pop(name, None)
        use_dora = bool(self.config.get("use_dora"))
        if (magnitude is not None) != use_dora:
            state = "has a" if magnitude is not None else "has no"
            raise self.wrong(f"{name}: {state} lora_magnitude_vector, but use_dora is {use_dora} in {ADAPTER_CONFIG}")
        if magnitude is not None and math.prod(magnitude.shape) != b.shape[0]:
            raise self.wrong(f"{magnitude.name}: expected {b.shape[0]:,} values, found shape {list(magnitude.shape)}")
        transposed = bool(self.config.get("fan_in_fan_out")) and not embedding
        return LoraModule(name, a, b, rank, scaling, magnitude, embedding, transposed, bias)
