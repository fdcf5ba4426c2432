"""FP8 weights joined with their scales; they are never read without them.

A weight W of dtype F8 has its scales in W_scale_inv (blocks: DeepSeek) or W_scale (one number, one a row, or blocks:
FBGEMM, compressed-tensors, ModelOpt). Despite the names the value is always F8 * scale. Scales of activations belong to
a way of computing, not to the weights, and are left out.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from merge.errors import CheckpointError
from merge.plan import TensorRef
from merge.quoting import quoted, some

_DEFAULT_BLOCK = (128, 128)
_ACTIVATION = (
    *("input_scale", "input_scale_inv", "input_scale_ub", "activation_scale", "output_scale"),
    *("k_scale", "v_scale", "q_scale", "prob_scale"),  # of the attention cache
)
# Scales that are not understood: a weight that has one of these and no other is refused.
_FOREIGN = ("scale", "scale_weight", "weight_scale_2", "scales", "qscale")


def fold_scales(
    path: str, config: Mapping[str, Any], tensors: Mapping[str, TensorRef]
) -> tuple[dict[str, TensorRef], tuple[str, ...]]:
    """Put each scale tensor into the TensorRef of its weight, and leave out scales of activations.

    Args:
        path: the model's directory, for messages.
        config: config.json.
        tensors: every tensor of the files.

    Returns:
        The tensors without scales, in the same order, and notes. `scale_block` is the (rows, columns) one scale covers
        in the weight seen as (product of all sizes but the last, last size); the scales, read in order, are the
        row-major grid of (ceil(rows / block rows), ceil(columns / block columns)).

    Raises:
        CheckpointError: quantised in a way that is not read, or FP8 without scales that fit.
    """
    quantization = _quantization(config)
    if quantization is not None:
        _refuse_other_methods(path, quantization)
    weights = {name: ref for name, ref in tensors.items() if ref.dtype.startswith("F8_")}
    folded: dict[str, TensorRef] = dict(tensors)
    used: set[str] = set()
    for name, ref in weights.items():
        scale = _scale_of(ref, tensors)
        if scale is not None:
            folded[name] = replace(ref, scale=scale, scale_block=_block(ref, scale, quantization))
            used.add(scale.name)
    bare = [name for name in weights if folded[name].scale is None]
    if bare and (quantization is not None or used):
        expected = f"{bare[0]}_scale_inv or {bare[0]}_scale"
        raise CheckpointError(
            f"{weights[bare[0]].file}: {bare[0]}: FP8 without its scales: expected {expected}, found neither "
            f"({len(bare):,} such tensors). Download all files again, or name the model in bf16."
        )
    left_out = [name for name in tensors if _is_activation(name, weights, quantization is not None)]
    gone = used.union(left_out)
    _refuse_orphans(tensors, gone, quantization)
    return {name: ref for name, ref in folded.items() if name not in gone}, _notes(path, used, left_out)


def _quantization(config: Mapping[str, Any]) -> Mapping[str, Any] | None:
    nested = config.get("text_config")
    for place in (config, nested if isinstance(nested, Mapping) else {}):
        for key in ("quantization_config", "compression_config"):
            value = place.get(key)
            if isinstance(value, Mapping) and value:
                return value
    return None


def _refuse_other_methods(path: str, quantization: Mapping[str, Any]) -> None:
    method = str(quantization.get("quant_method", "unknown"))
    if method in ("fp8", "fbgemm_fp8"):
        return
    if method == "modelopt" and quantization.get("quant_algo") == "FP8":
        return
    if method == "compressed-tensors" and _is_compressed_fp8(quantization):
        return
    raise CheckpointError(
        f"{path}/config.json: quantization_config: weights quantised by {method} are not read; expected FP8 or none. "
        "Dequantise the model first (to bf16), or name the original."
    )


def _is_compressed_fp8(quantization: Mapping[str, Any]) -> bool:
    groups = _groups(quantization)
    sparsity = quantization.get("sparsity_config") or {}
    transform = quantization.get("transform_config") or {}
    return (
        bool(groups)
        and all(group.get("type") == "float" and group.get("num_bits") == 8 for group in groups)
        and (not isinstance(sparsity, Mapping) or sparsity.get("format", "dense") == "dense")
        and not (isinstance(transform, Mapping) and transform.get("config_groups"))
    )


def _groups(quantization: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """How the weights of each group of compressed-tensors are quantised."""
    groups = quantization.get("config_groups")
    values = groups.values() if isinstance(groups, Mapping) else ()
    weights = [group.get("weights") for group in values if isinstance(group, Mapping)]
    return [item for item in weights if isinstance(item, Mapping)]


def _scale_of(ref: TensorRef, tensors: Mapping[str, TensorRef]) -> TensorRef | None:
    found = [tensors[name] for name in (f"{ref.name}_scale_inv", f"{ref.name}_scale") if name in tensors]
    if len(found) > 1:
        raise CheckpointError(f"{ref.file}: {ref.name}: has two scales, {found[0].name} and {found[1].name}.")
    stem = ref.name.removesuffix("weight")
    extra = f"{ref.name}_zero_point"
    foreign = [f"{stem}{suffix}" for suffix in _FOREIGN if f"{stem}{suffix}" in tensors and stem.endswith(".")]
    if extra in tensors or (foreign and not found):
        other = extra if extra in tensors else foreign[0]
        raise CheckpointError(
            f"{ref.file}: {ref.name}: FP8 with {other}, whose meaning is not known here. Dequantise the model first."
        )
    if not found:
        return None
    if found[0].dtype not in ("F32", "F16", "BF16"):
        raise CheckpointError(
            f"{found[0].file}: {found[0].name}: scales of dtype {found[0].dtype}; expected F32, BF16 or F16. "
            "Dequantise the model first."
        )
    return found[0]


def _block(ref: TensorRef, scale: TensorRef, quantization: Mapping[str, Any] | None) -> tuple[int, int]:
    """Rows and columns that one scale covers; checked against both shapes."""
    shape = ref.shape if len(ref.shape) > 1 else (1, *(ref.shape or (1,)))
    *stack, rows, columns = shape
    declared, is_binding = _declared_block(scale, quantization)
    if scale.size == 1 and not (is_binding and (rows > declared[0] or columns > declared[1])):
        return max(math.prod(shape[:-1]), 1), max(columns, 1)
    grid = (*scale.shape, *(1 for _ in range(len(shape) - len(scale.shape))))
    others = () if is_binding else ((1, columns), (rows, 1), (rows, columns))  # a row, a column, one of a stack
    for block in (declared, *others):
        if 0 not in block and grid == (*stack, *_grid(rows, columns, block)):
            break
    else:
        fitting = [*stack, *_grid(rows, columns, declared)]
        raise CheckpointError(
            f"{scale.file}: {scale.name}: {list(scale.shape)} scales do not fit {ref.name} {list(ref.shape)}; expected "
            f"{fitting} for blocks of {list(declared)}{'' if is_binding else ', or one scale, or one a row'}. "
            "Download all files again."
        )
    block = (min(block[0], rows), min(block[1], columns))
    if stack and rows % block[0]:
        raise CheckpointError(
            f"{ref.file}: {ref.name}: {list(ref.shape)} is not a whole number of blocks of {block[0]} rows, which is "
            "not read for stacked weights. Dequantise the model first."
        )
    return block


def _grid(rows: int, columns: int, block: tuple[int, int]) -> tuple[int, int]:
    return -(-rows // block[0]), -(-columns // block[1])


def _declared_block(scale: TensorRef, quantization: Mapping[str, Any] | None) -> tuple[tuple[int, int], bool]:
    """The block that the config declares, else the usual one; and whether nothing else will do."""
    if quantization is None:
        return _DEFAULT_BLOCK, False
    sizes = quantization.get("weight_block_size")
    for group in _groups(quantization):
        if group.get("strategy") == "block":
            sizes = group.get("block_structure")
        elif group.get("strategy") == "group":
            sizes = [1, group.get("group_size")]
    if sizes is None:
        return _DEFAULT_BLOCK, False
    if isinstance(sizes, list) and len(sizes) == 2 and all(type(size) is int and size > 0 for size in sizes):
        return (sizes[0], sizes[1]), scale.name.endswith("_scale_inv")
    raise CheckpointError(f"config.json: weight_block_size: expected two positive integers, found {quoted(sizes)}.")


def _is_activation(name: str, weights: Mapping[str, TensorRef], is_quantized: bool) -> bool:
    stem, _, last = name.rpartition(".")
    is_of_activations = last in _ACTIVATION or last.endswith(("_input_scale", "_activation_scale"))
    return is_of_activations and (is_quantized or f"{stem}.weight" in weights)


def _refuse_orphans(tensors: Mapping[str, TensorRef], known: set[str], quantization: Mapping[str, Any] | None) -> None:
    """In a quantised model, a scale whose weight is not FP8 tells that the weight is not what it seems."""
    for name in tensors if quantization is not None else ():
        weight = name.removesuffix("_inv").removesuffix("_scale")
        if name.endswith(("_scale", "_scale_inv")) and name not in known and weight in tensors:
            raise CheckpointError(
                f"{tensors[name].file}: {name}: is a scale, but {weight} is {tensors[weight].dtype}, expected FP8. "
                "Dequantise the model first, or remove what is left of its quantisation."
            )


def _notes(path: str, used: set[str], left_out: list[str]) -> tuple[str, ...]:
    notes = [f"{path}: FP8: {len(used):,} weights are read with their scales"] if used else []
    kinds: dict[str, list[str]] = {}
    for name in left_out:
        kinds.setdefault(name.rpartition(".")[2], []).append(name)
    notes.extend(
        f"{path}: left out {len(names):,} {kind} of activations: {some(names)}" for kind, names in kinds.items()
    )
    return tuple(notes)
