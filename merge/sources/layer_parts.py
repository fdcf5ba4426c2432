"""layer_parts: columns of matrices that hold some for each layer, put together for the layers of a stack (Gemma 3n).

inputs: matrices of as many rows. parameters: `layers`, of how many each input has columns; `parts`, for each layer of
the result the input and the layer there.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from merge.arrays import F32
from merge.chunks import CHUNK
from merge.plan import Derived, TensorRef
from merge.sources import Fill, Read
from merge.sources.joined import joined
from merge.sources.part import part


def layer_parts(
    name: str, sources: Sequence[TensorRef], axis: int, layers: Sequence[int], parts: Sequence[tuple[int, int]]
) -> TensorRef:
    """A tensor of equal parts along its first axis, or a matrix of equal parts along its second, one for each layer."""
    size, rest = sources[0].shape[axis] // layers[0], sources[0].shape[1:]
    if axis == 0:
        run = sources[0].size // layers[0]
        refs = [part(sources[which], layer * run, (size, *rest)) for which, layer in parts]
        return joined(name, refs, (size * len(parts), *rest))
    shape = (sources[0].shape[0], size * len(parts))
    parameters = {"layers": tuple(layers), "parts": tuple(parts)}
    return Derived(name, sources[0].dtype, shape, "layer_parts", tuple(sources), parameters)


def prepare(ref: Derived, read: Read) -> Fill:
    sources, layers, parts = ref.inputs, ref.parameters["layers"], ref.parameters["parts"]
    width = ref.shape[1]

    def fill(start: int, out: F32) -> None:
        first, last = start // width, -(-(start + len(out)) // width)
        rows = np.empty((last - first, len(parts), width // len(parts)), np.float32)
        for number, source in enumerate(sources):
            values = np.empty((last - first) * source.shape[1], np.float32)
            read(source, first * source.shape[1], values)  # whole rows: the parts may be short
            for place, (which, layer) in enumerate(parts):
                if which == number:
                    rows[:, place] = values.reshape(last - first, layers[number], -1)[:, layer]
        out[:] = rows.reshape(-1)[start - first * width : start - first * width + len(out)]

    return fill


def held_bytes(ref: Derived) -> int:
    """Rows of the result and of a source, of a chunk and a row on both sides."""
    widest = max(source.shape[1] for source in ref.inputs)
    return 4 * (ref.shape[1] + widest) * (2 + -(-CHUNK // ref.shape[1]))
