"""Turns an adapter's parts into changes of stored tensors: matrices, fused ones, and the experts of a layer."""

from __future__ import annotations

import math
from collections.abc import Mapping

from merge.adapter_kinds import AdaptedModule, find_kind
from merge.adapters.config import base_part, scaling_of
from merge.adapters.files import Adapter
from merge.adapters.parts import LoraModule, OtherModule, ParameterFactors
from merge.adapters.places import Place
from merge.architecture.loaded import Piece
from merge.plan import TensorRef
from merge.sources.adapted import adapted
from merge.sources.joined import joined
from merge.sources.lora import fold
from merge.sources.part import part
from merge.sources.residual import residual
from merge.sources.view import submatrix


class Tensors(dict[str, TensorRef]):
    """A checkpoint's tensors in which blocks of rows are replaced."""

    def block(self, piece: Piece) -> TensorRef:
        ref = self[piece.tensor]
        return part(ref, piece.start * math.prod(ref.shape[1:]), (piece.rows, *ref.shape[1:]))

    def put(self, piece: Piece, block: TensorRef) -> None:
        ref = self[piece.tensor]
        if piece.rows == ref.shape[0]:
            self[piece.tensor] = block
            return
        width, stop = math.prod(ref.shape[1:]), piece.start + piece.rows
        around = [part(ref, 0, (piece.start, *ref.shape[1:])), block]
        around.append(part(ref, stop * width, (ref.shape[0] - stop, *ref.shape[1:])))
        self[piece.tensor] = joined(ref.name, [each for each in around if each.size], ref.shape)


def replace(tensors: Tensors, place: Place, new: TensorRef) -> None:
    """Replaces everything at the place by `new`, which has the place's shape.

    Raises:
        ValueError: it is stored in another order, with the short cause.
    """
    for piece in place.pieces:
        if piece.stacked:
            raise ValueError("a whole tensor is saved that the checkpoint stores in another order")
        if piece.expert is None:
            start = piece.row * math.prod(place.shape[1:])
        else:
            start = (piece.expert * place.shape[1] + piece.row) * place.shape[2]
        tensors.put(piece, part(new, start, tensors.block(piece).shape))


def change_lora(tensors: Tensors, place: Place, module: LoraModule, adapter: Adapter, inputs_first: bool) -> None:
    """W + s·B·A for a matrix, which may consist of several stored matrices, or for a convolution.

    Args:
        inputs_first: a square matrix is stored (in, out).

    Raises:
        ValueError: shapes that do not fit, with the short cause.
    """
    n_in, n_out = math.prod(module.a.shape[1:]), module.b.shape[0]
    shape = place.shape[0], math.prod(place.shape[1:])
    plain, turned = (n_out, n_in), (n_in, n_out)
    is_convolution = len(place.shape) > 2 or len(module.a.shape) > 2
    transposed = not is_convolution and shape == turned and (module.embedding or shape != plain or inputs_first)
    fits = shape == (turned if transposed or module.embedding else plain)
    if not fits or (is_convolution and place.shape[1:] != module.a.shape[1:]):
        raise ValueError(
            f"lora_A {list(module.a.shape)} and lora_B {list(module.b.shape)} change a matrix of {n_out:,} outputs and "
            f"{n_in:,} inputs"
        )
    if (method := base_part(adapter.config)) is not None:
        if len(place.pieces) > 1 or is_convolution or module.embedding or (transposed and method == "qr"):
            raise ValueError("init_lora_weights took a part of the base's weights, and this is not one plain matrix")
        whole = residual(tensors.block(place.pieces[0]), method, module.rank, module.scaling, transposed)
        tensors.put(place.pieces[0], whole)
    if len(place.pieces) > 1 and transposed and module.magnitude is not None:
        raise ValueError("DoRA of a matrix that is stored in several cannot be folded here")
    a, b = part(module.a, 0, (module.rank, n_in)), part(module.b, 0, (n_out, module.rank))
    for piece in place.pieces:
        block, lengths = tensors.block(piece), module.magnitude
        left, right = b, a
        if len(place.pieces) > 1 and transposed:
            right = submatrix(a, 0, piece.row, (module.rank, piece.rows))
        elif len(place.pieces) > 1:
            left = part(b, piece.row * module.rank, (piece.rows, module.rank))
            lengths = None if lengths is None else part(lengths, piece.row, (piece.rows,))
        flat = part(block, 0, (piece.rows, shape[1]))
        tensors.put(piece, part(fold(flat, right, left, module.scaling, transposed, lengths), 0, block.shape))


def change_parameter(tensors: Tensors, place: Place, factors: ParameterFactors, adapter: Adapter) -> None:
    """The experts of a layer, P_e + s·B_e·A_e: one matrix each on the disk, parts of one, or all in one tensor.

    Raises:
        ValueError: shapes or ranks that do not fit, with the short cause.
    """
    n_experts, (rows, columns) = (place.shape[0] if len(place.shape) == 3 else 1), place.shape[-2:]
    rank, scaling = scaling_of(adapter.config, place.name)
    n_out, n_in = (columns, rows) if place.stacked_inputs else (rows, columns)
    if factors.a.shape != (rank * n_experts, n_in) or factors.b.shape != (n_out, rank * n_experts):
        raise ValueError(
            f"expected lora_A {[rank * n_experts, n_in]} and lora_B {[n_out, rank * n_experts]} for {place.name}, "
            f"found {list(factors.a.shape)} and {list(factors.b.shape)}"
        )

    def folded(block: TensorRef, expert: int, row: int, is_turned: bool) -> TensorRef:
        """`block`: rows `row` .. of the expert's matrix, or that matrix transposed."""
        a = submatrix(factors.a, expert * rank, 0, (rank, n_in))
        b = submatrix(factors.b, 0, expert, (n_out, rank), n_experts)
        count = block.shape[1] if is_turned else block.shape[0]
        if place.stacked_inputs:
            a = submatrix(a, 0, row, (rank, count))
        else:
            b = submatrix(b, row, 0, (count, rank))
        return fold(block, a, b, scaling, place.stacked_inputs != is_turned, None)

    for piece in place.pieces:
        ref = tensors[piece.tensor]
        if len(ref.shape) == 2:
            tensors.put(piece, folded(tensors.block(piece), piece.expert or 0, piece.row, False))
            continue
        # all experts in one tensor, each with all of its rows
        height, width = ref.shape[1:]
        blocks = [
            folded(part(ref, expert * height * width, (height, width)), expert, piece.row, piece.turned)
            for expert in range(n_experts)
        ]
        tensors[piece.tensor] = joined(ref.name, blocks, ref.shape)


def change_other(
    tensors: Tensors, place: Place, bias: Place | None, module: OtherModule, adapter: Adapter, inputs_first: bool
) -> None:
    """The changes of a matrix and its bias by an adapter of another kind.

    Raises:
        ValueError: tensors that do not fit, with the short cause.
    """
    if len(place.shape) != 2:
        raise ValueError(f"{place.name} has shape {list(place.shape)}, and only matrices are folded for {adapter.kind}")
    matrix = place.shape[::-1] if inputs_first else place.shape
    shapes: Mapping[str, tuple[int, ...]] = {name: ref.shape for name, ref in module.parts.items()}
    settings = find_kind(adapter.kind).settings(AdaptedModule(module.name, shapes, adapter.config), matrix)
    changes_bias = bool(settings.pop("bias", False))
    for each, turned in ((place, inputs_first), (bias if changes_bias else None, False)):
        if each is None:
            continue
        blocks = [tensors.block(piece) for piece in each.pieces]
        whole = adapted(joined(each.name, blocks, each.shape), adapter.kind, module.parts, turned, settings)
        width = math.prod(each.shape[1:])
        for piece in each.pieces:
            tensors.put(piece, part(whole, piece.row * width, (piece.rows, *each.shape[1:])))
