"""Merge methods: one function each, whose signature is the schema of its parameters, in a file of its own.

    @method(inputs="deltas", locality="tensor", paper="arXiv:2306.01708", formula="...")
    def ties(deltas, *, weight: PerModel[float], density: Annotated[PerModel[float], Range(0, 1)] = 1.0, ...): ...

The function is the textbook definition in torch. Neither torch nor numba is imported to read a signature.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import inspect
import math
import os
import pkgutil
import typing
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, Generic, Literal, TypeAlias, TypeVar

from merge.errors import MergeError
from merge.kernels.costs import Scratch, nothing
from merge.methods.entry_points import load_entry_points
from merge.plan import COPY

# either: deltas where the recipe has a base, else models; adapters: the changes that LoRA adapters make, and no models
Inputs = Literal["models", "deltas", "either", "adapters"]
Locality = Literal["element", "row", "tensor"]
BaseRole = Literal["none", "optional", "required"]
StatisticsKind = Literal["gram", "fisher"]
# bitwise: the same bytes on every machine; bounded: equal to rounding, as BLAS and torch choose their code by processor
Reproducible = Literal["bitwise", "bounded"]
MOST_MODELS = 500  # compiled loops are unrolled over models; numba takes no tuple of 1,000
T = TypeVar("T")


if TYPE_CHECKING:
    PerModel: TypeAlias = tuple[T, ...]
else:

    class PerModel(Generic[T]):
        """Marks a parameter that has one value for each input; the method gets them as a tuple."""


@dataclass(frozen=True)
class Range:
    """Closed interval a parameter must lie in."""

    low: float
    high: float = float("inf")


@dataclass(frozen=True)
class Parameter:
    """One key a recipe may write. `kind` is float, int, bool or str; `choices` lists the words of a Literal."""

    name: str
    kind: type
    per_model: bool
    required: bool
    default: Any = None
    range: Range | None = None
    choices: tuple[Any, ...] = ()
    doc: str = ""

    @property
    def has_effect(self) -> bool:
        """Whether it does anything: some are taken so that old recipes run, and do nothing."""
        return not self.doc.startswith(NO_EFFECT)


NO_EFFECT = "accepted for old recipes; no effect"
# What every method takes besides its own parameters where the inputs are adapters, and so the result is one.
OUTPUT_RANK = Parameter(
    "rank", int, per_model=False, required=False, range=Range(1), doc="rank of the resulting adapter"
)
# What mergekit's recipes say under any method; arithmetic here never needed it.
INT8_MASK = Parameter("int8_mask", bool, per_model=True, required=False, doc=NO_EFFECT)


@dataclass(frozen=True)
class Cost:
    """What a method that decomposes matrices takes: measured, for a matrix of 4096 x 4096 in float64 on one core.

    Time grows with the side that is decomposed times the number of entries.
    """

    seconds: float
    seconds_each: float  # and for each model
    elements: float  # float64 elements of temporaries for each element of the matrix
    elements_each: float  # and model
    squares: float  # and for each element of the square of the side that is decomposed
    side: Literal["shorter", "columns"] = "shorter"
    float32: float = 1.0  # share of the time where float32 does

    def of(self, shape: tuple[int, ...], n_models: int, float32: bool = False) -> tuple[float, int]:
        """(seconds, bytes) for a tensor; the matrices of one with more than two dimensions come one after another"""
        if len(shape) < 2 or 0 in shape:
            return 0.0, 0
        *leading, rows, columns = shape
        side = columns if self.side == "columns" else min(rows, columns)
        seconds = math.prod(leading) * (self.seconds + n_models * self.seconds_each)
        seconds *= (side / 4096) * (rows / 4096) * (columns / 4096) * (self.float32 if float32 else 1.0)
        each = rows * columns * (self.elements + n_models * self.elements_each) + side * side * self.squares
        return seconds, int(each * 8)


@dataclass(frozen=True)
class OnFactors:
    """What a method makes of the factors B and A of LoRA adapters; without it, their changes B A are formed whole.

    Attributes:
        weights: of a weighted sum, the factor of each change, found from the resolved parameters.
        compute: of any other method, "module:function" over the factors; see merge.kernels.low_rank.
        elements: of `compute`, float64 elements that it takes: (rows, columns, sum of ranks, adapters) -> number.
        rank: of the result: "all" of the adapters', "sum" of them if the recipe gives none, or the "largest".
        balanced: the result is always made by singular values, also where the factors would fit side by side.
    """

    weights: Callable[[dict[str, Any]], tuple[float, ...]] | None = None
    compute: str | None = None
    elements: Callable[[int, int, int, int], int] | None = None
    rank: Literal["all", "sum", "largest"] = "sum"
    balanced: bool = False

    def load_compute(self) -> Callable[..., Any]:
        found = _load(self.compute)
        assert found is not None
        return found


@dataclass(frozen=True)
class ModelPass:
    """Numbers over whole models that a method needs before the first tensor, where a parameter has a value.

    Attributes:
        find: "module:function" that finds them; see merge.engine.model_trim.
        key, value: the parameter, and the value that asks for it.
        uniform: a parameter that must then be the same for all tensors of a model.
    """

    find: str
    key: str
    value: Any
    uniform: str

    def load(self) -> Callable[..., Any]:
        found = _load(self.find)
        assert found is not None
        return found


@dataclass(frozen=True)
class Method:
    """A merge method. `reference` is torch; `fused`, where there is one, names the numba way as "module:function"."""

    name: str
    reference: Callable[..., Any]
    inputs: Inputs
    locality: Locality
    base: BaseRole
    parameters: tuple[Parameter, ...]
    paper: str
    formula: str
    example: str
    n_models: tuple[int, int] = (1, MOST_MODELS)  # fewest and most inputs, the base not counted
    base_is_input: bool = False  # the base is one of the inputs, and comes first (slerp)
    fused: str | None = None
    model_pass: ModelPass | None = None
    on_factors: OnFactors | None = None
    doc: str = ""
    random: bool = False
    check: Callable[[dict[str, Any]], str | None] | None = None  # what is wrong with a tensor's resolved parameters
    statistics: StatisticsKind | None = None  # what it needs of each input's statistics file, passed as `_statistics`
    scratch: Scratch = nothing  # memory of the kernel besides its blocks
    float32: bool = False  # takes `_float32`: whether that is precise enough, as where the result is rounded to 16 bits
    cost: Cost | None = None  # of methods that decompose matrices; `merge plan` shows it
    reproducible: Reproducible = "bounded"  # on the CPU, for models up to float32; see merge.engine.reproducible
    origin: str = ""  # where a method that is not part of this package comes from, with its version or digest

    @property
    def base_apart(self) -> bool:
        """Whether a base, where the recipe has one, is what task vectors start from and no input."""
        return self.base != "none" and not self.base_is_input

    def copies(self, parameters: dict[str, object]) -> bool:
        """Whether the method with these parameters is its single input, unchanged."""
        return self.n_models == (1, 1) and all(value is None for value in parameters.values())

    def parameter(self, name: str) -> Parameter | None:
        return next((parameter for parameter in self.parameters if parameter.name == name), None)

    def load_fused(self) -> Callable[..., Any] | None:
        """Imports the numba side only when it is about to run."""
        return _load(self.fused)

    def looks_at_model(self, parameters: Mapping[str, object]) -> bool:
        """Whether it needs its pass over whole models with these parameters."""
        return self.model_pass is not None and parameters.get(self.model_pass.key) == self.model_pass.value

    @property
    def takes_adapters(self) -> bool:
        """Whether it merges the changes that LoRA adapters make."""
        sums_changes = self.inputs == "deltas" and self.base_apart and self.statistics is None
        return self.inputs == "adapters" or self.on_factors is not None or sums_changes

    def keywords(self, parameters: Mapping[str, object]) -> dict[str, object]:
        """A recipe's parameters as the function's: `lambda` is `lambda_` there."""
        return {("lambda_" if key == "lambda" else key): value for key, value in parameters.items()}


def _load(place: str | None) -> Callable[..., Any] | None:
    if place is None:
        return None
    module, function = place.split(":")
    return typing.cast(Callable[..., Any], getattr(importlib.import_module(module), function))


def check_rank_probabilities(parameters: dict[str, Any]) -> str | None:
    """What is wrong with `density` and `epsilon` where keep probabilities rise from density - epsilon to + epsilon."""
    for density, epsilon in zip(parameters["density"], parameters["epsilon"], strict=True):
        if 0 < density < 1 and not 0 < density - epsilon <= density + epsilon < 1:
            return (
                f"density {density:g} with epsilon {epsilon:g} gives probabilities from {density - epsilon:.3g} to "
                f"{density + epsilon:.3g}, and they must lie between 0 and 1; a smaller epsilon does."
            )
    return None


_METHODS: dict[str, Method] = {}
_ORIGIN = ""  # of the methods that are being registered, where it is not this package; see merge/methods/method_file.py


def method(
    *,
    inputs: Inputs,
    locality: Locality,
    base: BaseRole = "none",
    paper: str = "",
    formula: str = "",
    example: str = "",
    n_models: tuple[int, int | None] = (1, None),
    base_is_input: bool = False,
    fused: str | None = None,
    model_pass: ModelPass | None = None,
    on_factors: OnFactors | None = None,
    random: bool = False,
    check: Callable[[dict[str, Any]], str | None] | None = None,
    statistics: StatisticsKind | None = None,
    scratch: Scratch = nothing,
    float32: bool = False,
    cost: Cost | None = None,
    reproducible: Reproducible = "bounded",
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Registers the decorated function as a merge method under its own name. It adds facts, not behaviour."""

    def register(function: Callable[..., Any]) -> Callable[..., Any]:
        name, home = function.__name__, function.__module__
        origin = _ORIGIN or ("" if home.startswith("merge.methods.") else f"module {home}")
        if name == COPY:
            raise MergeError(f'{origin or home}: "{COPY}" is what plans call copied bytes; choose another name.')
        if name in _METHODS:
            other = _METHODS[name]
            taken = f"{other.reference.__module__}, {other.origin or 'part of merge-workbench'}"
            raise MergeError(
                f'there is a method "{name}" already ({taken}); {origin or home} must choose another name.'
            )
        _METHODS[name] = Method(
            name=name,
            reference=function,
            inputs=inputs,
            locality=locality,
            base=base,
            parameters=_parameters(function),
            paper=paper,
            formula=formula,
            example=example,
            n_models=(n_models[0], n_models[1] or MOST_MODELS),
            base_is_input=base_is_input,
            fused=fused,
            model_pass=model_pass,
            on_factors=on_factors,
            doc=inspect.getdoc(function) or "",
            random=random,
            check=check,
            statistics=statistics,
            scratch=scratch,
            float32=float32,
            cost=cost,
            reproducible=reproducible,
            origin=origin,
        )
        return function

    return register


def _parameters(function: Callable[..., Any]) -> tuple[Parameter, ...]:
    # Only these annotations are evaluated: that of the tensors would need torch. A leading underscore marks what the
    # engine passes in (random keys, thresholds) and a recipe cannot write.
    everything = inspect.signature(function).parameters.values()
    if sum(p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD) for p in everything) != 1:
        raise TypeError(f'{function.__name__} must take one tensor, then "*", then its parameters')
    schema = {
        name: parameter
        for name, parameter in inspect.signature(function).parameters.items()
        if parameter.kind is inspect.Parameter.KEYWORD_ONLY and not name.startswith("_")
    }
    holder = type("schema", (), {"__annotations__": {name: parameter.annotation for name, parameter in schema.items()}})
    hints = typing.get_type_hints(holder, function.__globals__, include_extras=True)
    return tuple(_parameter(parameter, hints[name]) for name, parameter in schema.items())


def _parameter(parameter: inspect.Parameter, hint: object) -> Parameter:
    range_, doc = None, ""
    if typing.get_origin(hint) is Annotated:
        hint, *extras = typing.get_args(hint)
        range_ = next((extra for extra in extras if isinstance(extra, Range)), None)
        doc = next((extra for extra in extras if isinstance(extra, str)), "")
    per_model = typing.get_origin(hint) is PerModel
    if per_model:
        (hint,) = typing.get_args(hint)
    choices: tuple[Any, ...] = ()
    if typing.get_origin(hint) is Literal:
        choices = typing.get_args(hint)
        hint = str
    if hint not in (float, int, bool, str):
        types = "float, int, bool, str, Literal or PerModel of one of them"
        raise TypeError(f'parameter "{parameter.name}" needs a type: {types}')
    required = parameter.default is inspect.Parameter.empty
    return Parameter(
        name=parameter.name.rstrip("_"),  # `lambda_` is `lambda` in a recipe
        kind=hint,
        per_model=per_model,
        required=required,
        default=None if required else parameter.default,
        range=range_,
        choices=choices,
        doc=doc,
    )


def all_methods() -> dict[str, Method]:
    """Every method, by name, in alphabetical order."""
    _import_methods()
    return dict(sorted(_METHODS.items()))


@functools.cache
def _import_methods() -> None:
    """Imports every file of merge/methods, then those of installed packages."""
    for module in pkgutil.iter_modules([os.path.dirname(__file__)]):
        importlib.import_module(f"merge.methods.{module.name}")
    load_entry_points(registering)


def get_method(name: str) -> Method | None:
    _import_methods()
    return _METHODS.get(name)


def known_method(name: str) -> Method:
    """The method of a recipe or plan, whose names were checked when it was made."""
    method = get_method(name)
    assert method is not None, name
    return method


@contextlib.contextmanager
def registering(origin: str) -> Iterator[list[str]]:
    """What is registered inside comes from `origin`, and is in the list afterwards; nothing stays if it fails."""
    global _ORIGIN
    before = dict(_METHODS)
    names: list[str] = []
    outer, _ORIGIN = _ORIGIN, origin
    try:
        yield names
        names += [name for name in _METHODS if name not in before]
    except BaseException:
        _METHODS.clear()
        _METHODS.update(before)
        raise
    finally:
        _ORIGIN = outer


def forget(module: str) -> None:
    """Drops the methods that a module registered."""
    for name in [name for name, one in _METHODS.items() if one.reference.__module__ == module]:
        del _METHODS[name]
