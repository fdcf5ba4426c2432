"""How transformers loads a checkpoint: the stored tensors of each parameter of the model in memory.

PEFT names modules as transformers' classes do. For many models that is not what stands on the disk: towers of
vision-language models have other prefixes, and the experts of a layer are one parameter in memory and a tensor each on
the disk. Both are looked up in transformers' own tables, with the model built on the meta device: no weight is read.

Source: transformers 5.23, conversion_mapping.py and core_model_loading.py (convert_and_load_state_dict_in_model).
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from merge.jsontext import parse_json
from merge.plan import TensorRef

if TYPE_CHECKING:
    from torch.nn import Module

Shape = tuple[int, ...]
LINEAR, CONV1D, EMBEDDING = "linear", "conv1d", "embedding"


@dataclass(frozen=True)
class Piece:
    """Rows of a parameter that are rows of one stored tensor.

    Attributes:
        tensor: name on the disk.
        row: where its rows begin in the parameter.
        start: where they begin in the stored tensor.
        rows: how many.
        expert: of a parameter that stacks a matrix for each expert, the one whose rows these are.
        stacked: both stack matrices, and these are rows of each.
        turned: the stored matrices are the transposed ones.
    """

    tensor: str
    row: int
    start: int
    rows: int
    expert: int | None = None
    stacked: bool = False
    turned: bool = False


@dataclass(frozen=True)
class Loaded:
    """A model's parameters as transformers holds them in memory.

    Attributes:
        shapes: parameter or buffer -> shape, in the order of the state dict.
        pieces: parameter -> what it is read from; what the checkpoint does not have is not there.
        obscure: parameter -> names of the conversions that make it, where they do more than move rows.
        kinds: module -> LINEAR, CONV1D (a linear layer stored (in, out)) or EMBEDDING, for modules that are one.
        head: the matrix of the output tokens.
        own: module -> its own parameters, in their order.
        transposed: modules whose stacked matrices are (in, out).
        ties: parameter -> the one whose numbers it has, as the config says.
    """

    shapes: Mapping[str, Shape]
    pieces: Mapping[str, tuple[Piece, ...]]
    obscure: Mapping[str, str]
    kinds: Mapping[str, str]
    head: str | None
    own: Mapping[str, tuple[str, ...]]
    transposed: frozenset[str]
    ties: Mapping[str, str]


def how_loaded(
    config: Mapping[str, Any], tensors: Mapping[str, TensorRef], class_name: str | None = None
) -> Loaded | None:
    """How transformers would load these tensors; None for a model that it does not know or cannot build.

    Args:
        config: config.json.
        class_name: the class of transformers; by default the first of the config's architectures.
    """
    name = class_name or next(iter(config.get("architectures") or ()), None)
    model = _skeleton(json.dumps(config, sort_keys=True, default=str), name) if isinstance(name, str) else None
    return None if model is None else _Table(model, tensors).loaded()


@dataclass(frozen=True)
class Makings:
    """How stored tensors fit a model that already exists.

    Attributes:
        pieces, obscure: see Loaded.
        shapes: parameter or buffer -> shape of what the stored tensors make of it; and name -> shape of each stored
            tensor that is made into nothing.
    """

    pieces: Mapping[str, tuple[Piece, ...]]
    obscure: Mapping[str, str]
    shapes: Mapping[str, Shape]


def makings_of(model: Module, tensors: Mapping[str, TensorRef]) -> Makings:
    """How transformers would load these tensors into a model; only the shapes of its parameters are looked at."""
    table = _Table(model, tensors)
    table.read()
    return Makings(table.pieces, table.obscure, table.made)


@lru_cache(maxsize=4)
def _skeleton(config_text: str, class_name: str) -> Any:
    """The model on the meta device; None if transformers lacks the class or cannot build it."""
    import torch
    from transformers.utils import logging

    from merge.loading import library

    transformers = library()
    config = _decoded(parse_json(config_text))
    config.pop("quantization_config", None)  # modules are named as in the plain model
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        with warnings.catch_warnings(), torch.device("meta"), torch.random.fork_rng(devices=[]):
            warnings.simplefilter("ignore")
            known = transformers.CONFIG_MAPPING[config["model_type"]].from_dict(config)
            return getattr(transformers, class_name)(known)
    except Exception:  # a config of another version, or a class that needs missing packages
        return None
    finally:
        logging.set_verbosity(verbosity)


def _decoded(value: Any) -> Any:
    """A config with numbers for {"__float__": "Infinity"}, as transformers writes what JSON lacks."""
    if isinstance(value, list):
        return [_decoded(each) for each in value]
    if not isinstance(value, dict):
        return value
    if set(value) == {"__float__"}:
        return float(value["__float__"])
    return {key: _decoded(each) for key, each in value.items()}


def _kind(module: Module) -> str | None:
    from torch import nn
    from transformers.pytorch_utils import Conv1D

    if isinstance(module, Conv1D):
        return CONV1D
    return LINEAR if isinstance(module, nn.Linear) else EMBEDDING if isinstance(module, nn.Embedding) else None


def _head(model: Module) -> Any:
    try:
        return model.get_output_embeddings()
    except (NotImplementedError, AttributeError):  # a model without a vocabulary
        return None


class _Table:
    """Assigns the stored tensors to the parameters that they are read into."""

    def __init__(self, model: Module, tensors: Mapping[str, TensorRef]) -> None:
        self.model = model
        self.shapes: dict[str, Shape] = {name: tuple(value.shape) for name, value in model.state_dict().items()}
        self.stored = {name: ref.shape for name, ref in tensors.items()}
        self.pieces: dict[str, tuple[Piece, ...]] = {}
        self.obscure: dict[str, str] = {}
        self.made: dict[str, Shape] = {}  # see Makings.shapes

    def loaded(self) -> Loaded:
        self.read()
        modules = dict(self.model.named_modules())
        return Loaded(
            shapes=self.shapes,
            pieces=self.pieces,
            obscure=self.obscure,
            kinds={name: kind for name, each in modules.items() if (kind := _kind(each)) is not None},
            head=next((f"{name}.weight" for name, each in modules.items() if each is _head(self.model)), None),
            own={name: tuple(key for key, _ in each.named_parameters(recurse=False)) for name, each in modules.items()},
            transposed=frozenset(name for name, each in modules.items() if getattr(each, "is_transposed", False)),
            ties=dict(self.model.all_tied_weights_keys),
        )

    def read(self) -> None:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key, rename_source_key

        prefix = self.model.base_model_prefix
        mapping = get_model_conversion_mapping(self.model)
        renamings = [each for each in mapping if isinstance(each, WeightRenaming)]
        converters = [each for each in mapping if isinstance(each, WeightConverter)]
        gathered: dict[str, dict[str, list[str]]] = {}  # parameter -> pattern -> stored names
        for name in sorted(self.stored, key=dot_natural_key):
            key, pattern = rename_source_key(name, renamings, converters, prefix, self.shapes)
            if key not in self.shapes and name in self.shapes:
                key, pattern = rename_source_key(name, [], [], prefix, self.shapes)
            if key in self.shapes and pattern is not None:
                gathered.setdefault(key, {}).setdefault(pattern, []).append(name)
                continue
            if key in self.shapes:
                self.pieces[key] = (whole_piece(name, self.stored[name]),)
            self.made[key if key in self.shapes else name] = self.stored[name]
        for key, sources in gathered.items():
            first = next(iter(sources))
            self._convert(key, next(each for each in converters if first in each.source_patterns), sources)

    def _convert(self, key: str, converter: Any, sources: Mapping[str, list[str]]) -> None:
        """Runs a conversion on tensors without numbers, for its results' names and shapes."""
        import torch

        trial = deepcopy(converter)
        for pattern, names in sources.items():
            for name in names:
                trial.add_tensor(key, name, pattern, torch.empty(self.stored[name], device="meta"))
        groups = [sources[pattern] for pattern in converter.source_patterns if pattern in sources]
        said = ", ".join(type(each).__name__ for each in converter.operations)
        try:
            made = trial.convert(key, model=self.model, config=self.model.config)
            shapes = {name: tuple((each[0] if isinstance(each, list) else each).shape) for name, each in made.items()}
        except Exception:  # tensors that transformers could not put together either
            self.obscure[key], self.made[key] = said, self.shapes[key]
            return
        self.made |= shapes
        for name, pieces in zip(shapes, self._pieces(converter.operations, groups, shapes), strict=False):
            if pieces:
                self.pieces[name] = pieces
            else:
                self.obscure[name] = said

    def _pieces(
        self, operations: Sequence[Any], groups: Sequence[list[str]], shapes: Mapping[str, Shape]
    ) -> list[tuple[Piece, ...]]:
        """The pieces of each result; () if an operation is not known here."""
        steps = [(type(each).__name__, getattr(each, "dim", None)) for each in operations]
        names = [name for group in groups for name in group]
        target = next(iter(shapes.values()))
        match steps:
            case [("MergeModulelist", 0)] | [("MergeModulelist", 0), ("Concatenate", 1)]:
                return [tuple(self._experts(groups))]
            case [("Concatenate", 0)]:
                return [tuple(self._one_after_another(names, stacked=False))]
            case [("Concatenate", 1)] if len(target) == 3:
                return [tuple(self._one_after_another(names, stacked=True))]
            case [("Chunk", 0)]:
                rows = [_rows(shape) for shape in shapes.values()]
                return [(Piece(names[0], 0, sum(rows[:i]), count),) for i, count in enumerate(rows)]
            case [("Transpose", _)] if len(target) == 3 and {operations[0].dim0, operations[0].dim1} == {1, 2}:
                stored = self.stored[names[0]]
                is_turned = not operations[0].check_dims or stored != target
                whole = whole_piece(names[0], stored)
                return [(Piece(names[0], 0, 0, target[1], stacked=True, turned=True) if is_turned else whole,)]
        return [() for _ in shapes]

    def _experts(self, groups: Sequence[list[str]]) -> list[Piece]:
        """Matrices of experts, each with those of all groups below each other."""
        pieces, row = [], 0
        for group in groups:
            rows = _rows(self.stored[group[0]])
            pieces += [Piece(name, row, 0, rows, expert) for expert, name in enumerate(group)]
            row += rows
        return pieces

    def _one_after_another(self, names: Sequence[str], stacked: bool) -> list[Piece]:
        pieces, row = [], 0
        for name in names:
            pieces.append(Piece(name, row, 0, self.stored[name][1 if stacked else 0], stacked=stacked))
            row += pieces[-1].rows
        return pieces


def whole_piece(name: str, shape: Shape) -> Piece:
    """The piece that is a whole stored tensor."""
    return Piece(name, 0, 0, _rows(shape))


def _rows(shape: Shape) -> int:
    return shape[0] if shape else 1
