"""upscale: depth up-scaling written as slices, in this one place, so that the plan shows what it comes to.

`overlap: m` is the stack of SOLAR (Kim et al. 2023, arXiv:2312.15166, section 2): of n layers the first n - m and then
the last n - m. `layers: N` finds m. `insert_every: k` is the block expansion of LLaMA Pro (Wu et al. 2024,
arXiv:2401.02415, section 3.2): after every k layers the last of them again, with the matrices zero through which its
attention and its MLP write to the residual stream, so that the larger model computes what the smaller one does.
"""

from __future__ import annotations

import dataclasses

from merge.errors import Problem
from merge.planned import Planned, Said
from merge.planning.inputs import Input, Inputs
from merge.recipe.model import Conditional, Recipe, Settings, Slice, Source

# What attention and MLP write through, by the names it goes by; a layer has one of each.
_ATTENTION_OUT = ("o_proj", "out_proj", "attn.c_proj", "attention.dense", "attention.wo", "out_lin")
_MLP_OUT = ("down_proj", "mlp.c_proj", "dense_4h_to_h", "fc2", ".w2", "fc_out", "lin2")


def upscaled(recipe: Recipe, inputs: Inputs) -> Planned[Recipe]:
    """The recipe with slices in place of `upscale`; as it is if it has none, or where a problem was found."""
    upscale = recipe.upscale
    if upscale is None:
        return Planned(recipe)
    source = recipe.models[0]
    model = inputs.all[inputs.place(source.model)]
    if model.main is None:
        message = f"{model.ref.text} has no stack of layers that its config confirms"
        return Planned(recipe, (Problem(message, recipe.where("upscale")),))
    n, said = model.main.n_layers, Said()
    if upscale.insert_every is not None:
        parts = said.take(_inserted(recipe, source, model, upscale.insert_every, n))
    else:
        overlap = said.take(_overlap(recipe, model, n))
        if overlap is None:
            return said.with_value(recipe)
        parts = [_slice(source, 0, n - overlap), _slice(source, overlap, n)]
    return said.with_value(dataclasses.replace(recipe, models=(), slices=tuple(parts)))


def _slice(source: Source, start: int, end: int, parameters: Settings | None = None) -> Slice:
    return Slice((dataclasses.replace(source, layer_range=(start, end)),), None, parameters or {}, source.line)


def _overlap(recipe: Recipe, model: Input, n: int) -> Planned[int | None]:
    """The number of layers that each of the two copies leaves out."""
    assert recipe.upscale is not None
    overlap, wanted = recipe.upscale.overlap, recipe.upscale.layers
    if overlap is not None:
        if 2 * overlap < n:
            return Planned(overlap)
        message = f"an overlap of {overlap} leaves {2 * max(0, n - overlap)} layers; {model.ref.text} has {n} already."
        hint = f"The largest overlap that makes it deeper is {(n - 1) // 2}."
        return Planned(None, (Problem(message, recipe.where("upscale.overlap"), hint),))
    assert wanted is not None
    if n < wanted <= 2 * n and wanted % 2 == 0:
        return Planned(n - wanted // 2)
    message = f"{wanted} layers cannot be made of two copies of {model.ref.text}, which has {n} layers."
    hint = f"Write an even number from {n + 2 - n % 2} to {2 * n}."
    return Planned(None, (Problem(message, recipe.where("upscale.layers"), hint),))


def _inserted(recipe: Recipe, source: Source, model: Input, every: int, n: int) -> Planned[list[Slice]]:
    assert recipe.upscale is not None
    said = Said()
    if every > n:
        message = f"{model.ref.text} has {n} layers, so that none is inserted after every {every}."
        said.problems.append(Problem(message, recipe.where("upscale.insert_every"), f"Write a number from 1 to {n}."))
    silent = said.take(_silent(recipe, model)) if recipe.upscale.zero_init else {}
    parts = []
    for end in range(every, n + 1, every):
        parts += [_slice(source, end - every, end), _slice(source, end - 1, end, silent)]
    rest = n % every
    return said.with_value(parts + ([_slice(source, n - rest, n)] if rest else []))


def _silent(recipe: Recipe, model: Input) -> Planned[Settings]:
    """Parameters of passthrough that make a layer the identity."""
    problems = []
    filters = [name for name in (*_ATTENTION_OUT, *_MLP_OUT) if any(name in tensor for tensor in model.tensors)]
    if not set(filters) & set(_ATTENTION_OUT) or not set(filters) & set(_MLP_OUT):
        message = (
            f"zero_init: the names of {model.ref.text} do not show the matrices through which its attention and its "
            "MLP write."
        )
        hint = 'Set "zero_init: false", or write slices with "scale: [{filter: NAME, value: 0}]".'
        problems.append(Problem(message, recipe.where("upscale"), hint))
    return Planned({"scale": tuple(Conditional(name, 0.0) for name in filters)}, tuple(problems))
