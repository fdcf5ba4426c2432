"""FP8 weights joined with their scales; they are never read without them.

A weight W of dtype F8 has its scales in W_scale_inv (blocks: DeepSeek) or W_scale (one number, one a row, or blocks:
FBGEMM, compressed-tensors, ModelOpt). Despite the names the value is always F8 * scale. Scales of activations are left
out: they concern quantised computation, not the weights.
"""

from __future__ import annotations

import math
from collections.abc import Container, Mapping

from merge.checkpoint.formats import Quantization, Tensors
from merge.errors import CheckpointError
from merge.plan import TensorRef
from merge.quoting import counted, quoted, some
from merge.sources.scaled import scaled

NAME = "FP8"
_DEFAULT_BLOCK = (128, 128)
_ACTIVATION = (
    *("input_scale", "input_scale_inv", "input_scale_ub", "activation_scale", "output_scale"),
    *("k_scale", "v_scale", "q_scale", "prob_scale"),  # of the attention cache
)
# Scales that are not understood: a weight that has one of these and no other is refused.
_FOREIGN = ("scale", "scale_weight", "weight_scale_2", "scales", "qscale")


def recognises(quantization: Quantization | None, tensors: Tensors) -> bool:
    if quantization is None:
        return any(ref.dtype.startswith("F8_") for ref in tensors.values())
    method = quantization.get("quant_method")
    return method in ("fp8", "fbgemm_fp8") or (method == "modelopt" and quantization.get("quant_algo") == "FP8")


def sources(
    path: str, quantization: Quantization | None, tensors: Tensors
) -> tuple[dict[str, TensorRef], tuple[str, ...]]:
    """Each weight times its scales; scales of activations are left out."""
    weights = {name: ref for name, ref in tensors.items() if ref.dtype.startswith("F8_")}
    folded: dict[str, TensorRef] = dict(tensors)
    used: set[str] = set()
    ends = {name.rpartition(".")[2] for name in tensors}
    blocks: dict[object, tuple[int, int]] = {}  # of 45,000 weights of three shapes
    for name, ref in weights.items():
        scale = _scale_of(ref, tensors, ends)
        if scale is not None:
            kind = ref.shape, scale.shape, scale.name.endswith("_inv")
            if kind not in blocks:
                blocks[kind] = _block(ref, scale, quantization)
            folded[name] = scaled(ref, scale, blocks[kind])
            used.add(scale.name)
    bare = [name for name in weights if folded[name] is weights[name]]
    if bare and (quantization is not None or used):
        expected = f"{bare[0]}_scale_inv or {bare[0]}_scale"
        raise CheckpointError(
            f"{weights[bare[0]].file}: {bare[0]}: FP8 without its scales: expected {expected}, found neither "
            f"({len(bare):,} such tensors). Download all files again, or name the model in bf16."
        )
    of_activations = {end for end in ends if _is_of_activations(end)}
    left_out = [name for name in tensors if of_activations and _is_activation(name, weights, quantization is not None)]
    gone = used.union(left_out)
    _refuse_orphans(tensors, gone, quantization)
    return {name: ref for name, ref in folded.items() if name not in gone}, _notes(used, left_out)


def group_weights(quantization: Quantization) -> list[Mapping[str, object]]:
    """How the weights of each group of compressed-tensors are quantised."""
    groups = quantization.get("config_groups")
    values = groups.values() if isinstance(groups, Mapping) else ()
    weights = [group.get("weights") for group in values if isinstance(group, Mapping)]
    return [item for item in weights if isinstance(item, Mapping)]


def _scale_of(ref: TensorRef, tensors: Tensors, ends: Container[str]) -> TensorRef | None:
    """`ends`: the last parts of all names."""
    found = [tensors[name] for name in (f"{ref.name}_scale_inv", f"{ref.name}_scale") if name in tensors]
    if len(found) > 1:
        raise CheckpointError(f"{ref.file}: {ref.name}: has two scales, {found[0].name} and {found[1].name}.")
    stem = ref.name.removesuffix("weight")
    extra = f"{ref.name}_zero_point"
    foreign = [
        f"{stem}{suffix}"
        for suffix in _FOREIGN
        if suffix in ends and f"{stem}{suffix}" in tensors and stem.endswith(".")
    ]
    if extra in tensors or (foreign and not found):
        other = extra if extra in tensors else foreign[0]
        raise CheckpointError(
            f"{ref.file}: {ref.name}: FP8 with {other}, which is not supported. Dequantise the model first."
        )
    if not found:
        return None
    if found[0].dtype not in ("F32", "F16", "BF16"):
        raise CheckpointError(
            f"{found[0].file}: {found[0].name}: scales of dtype {found[0].dtype}; expected F32, BF16 or F16. "
            "Dequantise the model first."
        )
    return found[0]


def _block(ref: TensorRef, scale: TensorRef, quantization: Quantization | None) -> tuple[int, int]:
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


def _declared_block(scale: TensorRef, quantization: Quantization | None) -> tuple[tuple[int, int], bool]:
    """The block that the config declares, else the usual one; and whether it is the only valid one."""
    if quantization is None:
        return _DEFAULT_BLOCK, False
    sizes = quantization.get("weight_block_size")
    for group in group_weights(quantization):
        if group.get("strategy") == "block":
            sizes = group.get("block_structure")
        elif group.get("strategy") == "group":
            sizes = [1, group.get("group_size")]
    if sizes is None:
        return _DEFAULT_BLOCK, False
    if isinstance(sizes, list) and len(sizes) == 2 and all(type(size) is int and size > 0 for size in sizes):
        return (sizes[0], sizes[1]), scale.name.endswith("_scale_inv")
    raise CheckpointError(f"config.json: weight_block_size: expected two positive integers, found {quoted(sizes)}.")


def _is_activation(name: str, weights: Tensors, is_quantized: bool) -> bool:
    stem, _, end = name.rpartition(".")
    return _is_of_activations(end) and (is_quantized or f"{stem}.weight" in weights)


def _is_of_activations(end: str) -> bool:
    return end in _ACTIVATION or end.endswith(("_input_scale", "_activation_scale"))


def _refuse_orphans(tensors: Tensors, known: set[str], quantization: Quantization | None) -> None:
    """Refuses scales whose weight is not FP8: in a quantised model, such a weight is not a plain one."""
    for name in tensors if quantization is not None else ():
        if not name.endswith(("_scale", "_scale_inv")) or name in known:
            continue
        weight = name.removesuffix("_inv").removesuffix("_scale")
        if weight in tensors:
            raise CheckpointError(
                f"{tensors[name].file}: {name}: is a scale, but {weight} is {tensors[weight].dtype}, expected FP8. "
                "Dequantise the model first, or remove the leftovers of its quantisation."
            )


def _notes(used: set[str], left_out: list[str]) -> tuple[str, ...]:
    notes = [f"FP8: {counted(len(used), 'weight')} read with scales"] if used else []
    kinds: dict[str, list[str]] = {}
    for name in left_out:
        kinds.setdefault(name.rpartition(".")[2], []).append(name)
    notes.extend(f"left out {len(names):,} {kind} of activations: {some(names)}" for kind, names in kinds.items())
    return tuple(notes)
