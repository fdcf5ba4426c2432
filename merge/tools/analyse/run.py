"""analyse(): opens the models, measures every tensor and a sample of matrices, and says what follows."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence

from merge.architecture.tensor_kinds import role_of
from merge.checkpoint.reader import SourceReader
from merge.dtypes import DTYPES
from merge.engine.crew import Crew
from merge.engine.tensor import Buffers, StepTensor
from merge.errors import RecipeError, UsageError
from merge.one_thread import ONE_THREAD
from merge.plan import TensorRef
from merge.planning.inputs import Inputs, open_inputs
from merge.planning.same_architecture import different_architectures
from merge.processors import processors
from merge.recipe.mentioned import key_of
from merge.recipe.model import ModelRef, Recipe, Source
from merge.tools.analyse.checks import checks
from merge.tools.analyse.elements import DENSITIES, DeltaSums, measure, readable
from merge.tools.analyse.looks import look_of
from merge.tools.analyse.preflight import preflight
from merge.tools.analyse.recipe import suggested_recipe
from merge.tools.analyse.results import AnalysedTensor, Analysis, AnalysisFinding
from merge.tools.analyse.spectra import MatrixSpectra, spectra
from merge.tools.analyse.suggest import suggest
from merge.tools.diff import side_by_side

MATRICES = 160  # whose singular values are computed
_CACHE = 384 << 20  # bytes of sources that all threads together keep between two passes over a tensor
_MATRIX_COST = 3  # bytes of a matrix count this often in the progress when its singular values are computed


def analyse(
    base: ModelRef,
    models: Sequence[ModelRef],
    *,
    matrices: int = MATRICES,
    seed: int = 0,
    threads: int | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Analysis:
    """Measures fine-tunes of one base before they are merged.

    Args:
        matrices: how many matrices' singular values are computed at most; spread over roles and layers.
        seed: of the random vectors for them.
        threads: that read and compute; all processors by default. Never changes the result.
        progress: called with work done and work in all.

    Raises:
        UsageError: no model, the base among the models, or a model twice.
        RecipeError: models that are of another architecture or size, or have no tensor in common with the base.
        CheckpointError: a model that cannot be opened or read; SourceChanged: one that changes meanwhile.
    """
    _check_models(base, models)
    asked = Recipe("task_arithmetic", models=tuple(map(Source, models)), base_model=base)
    inputs, _, notes = open_inputs(asked)
    if problems := list(different_architectures(asked, inputs)):
        raise RecipeError(problems)
    places = [inputs.place(ref) for ref in (base, *models)]
    common, left_out = _common(inputs, places)
    if not common:
        raise RecipeError(f"{base.text} and the other models have no tensor of numbers in common: nothing to measure.")
    work = _Measuring(inputs, common, matrices, seed, threads or processors(), progress)
    tensors, digests = work.run()
    left_out += work.left_out
    names = tuple(ref.text for ref in models)
    findings = [*preflight([inputs.all[place] for place in places]), *checks(names, tensors, digests)]
    choice = suggest(names, tensors, findings)
    recipe = suggested_recipe(base, models, choice)
    if recipe.problem is not None:
        findings.append(AnalysisFinding("problem", "recipe", names, recipe.problem))
    return Analysis(
        base=base.text,
        models=names,
        densities=DENSITIES,
        tensors=tuple(tensors),
        left_out=tuple(left_out),
        findings=tuple(findings),
        looks=tuple(look_of(place, tensors) for place in range(len(models))),
        suggestions=choice.suggestions,
        recipe=recipe.text,
        notes=notes,
    )


def _check_models(base: ModelRef, models: Sequence[ModelRef]) -> None:
    if not models:
        raise UsageError("name the base and at least one fine-tune of it: merge analyse BASE A B ...")
    for ref, count in Counter(map(key_of, models)).items():
        text = next(model.text for model in models if key_of(model) == ref)
        if ref == key_of(base):
            raise UsageError(f"{text} is the base, and cannot be one of its fine-tunes. Name it once, first.")
        if count > 1:
            raise UsageError(f"{text} is named {count} times. Name each model once.")


def _common(
    inputs: Inputs, places: Sequence[int]
) -> tuple[list[tuple[str, tuple[TensorRef, ...]]], list[tuple[str, str]]]:
    """Tensors of numbers that all have in one shape, base first; and the others, each with the reason."""
    found, left_out = [], []
    for name in inputs.names:
        refs = [inputs.all[place].tensors.get(name) for place in places]
        known = tuple(ref for ref in refs if ref is not None)
        if len(known) < len(refs):
            lacking = [inputs.all[p].ref.text for p, ref in zip(places, refs, strict=True) if ref is None]
            left_out.append((name, f"not in {', '.join(lacking)}"))
        elif len({ref.shape for ref in known}) > 1:
            left_out.append((name, f"shapes differ: {', '.join(str(list(ref.shape)) for ref in known)}"))
        elif not all(DTYPES[ref.dtype].is_float for ref in known):
            left_out.append((name, "not all are floats"))
        else:
            found.append((name, known))
    return found, left_out


class _Measuring:
    """Both passes over all tensors, on threads."""

    def __init__(
        self,
        inputs: Inputs,
        common: Sequence[tuple[str, tuple[TensorRef, ...]]],
        matrices: int,
        seed: int,
        threads: int,
        progress: Callable[[int, int], None],
    ) -> None:
        self.inputs, self.seed, self.threads = inputs, seed, threads
        self.names = [name for name, _ in common]
        self.refs = [refs for _, refs in common]
        self.left_out: list[tuple[str, str]] = []
        stack = inputs.donor.main
        at = [stack.layer(name) if stack else None for name in self.names]
        self.layers = [None if place is None else place[0] for place in at]
        self.roles = [role_of(name) for name in self.names]
        self.sizes = [sum(ref.nbytes for ref in refs) for refs in self.refs]
        self.sample = self._sampled(matrices)
        self.sums: dict[int, DeltaSums] = {}
        self.spectra: dict[int, MatrixSpectra] = {}
        self.digests: dict[int, list[str]] = {}
        self.total = sum(self.sizes) + _MATRIX_COST * sum(self.sizes[place] for place in self.sample)
        self.done = [0] * (2 * len(common))
        self.tick = lambda: progress(sum(self.done), self.total)

    def run(self) -> tuple[list[AnalysedTensor], list[tuple[str, ...]]]:
        """Tensors, and the digests of all of each model's."""
        order = sorted(range(len(self.refs)), key=lambda place: -self.sizes[place])
        with SourceReader([file for model in self.inputs.all for file in model.checkpoint.files]) as reader:
            crew, buffers = Crew(self.threads), Buffers()
            self._by_element(order[-1:] + order[:-1], reader, crew, buffers)
            with ONE_THREAD:
                self._by_matrix([place for place in order if place in self.sample], reader, crew)
            reader.check_unchanged()
        tensors = [
            AnalysedTensor(
                self.names[place],
                self.roles[place],
                self.layers[place],
                self.refs[place][0].shape,
                tuple(ref.dtype for ref in self.refs[place]),
                sums,
                self.spectra.get(place),
            )
            for place, sums in sorted(self.sums.items())
        ]
        return tensors, list(zip(*(self.digests[place] for place in sorted(self.digests)), strict=True))

    def _by_element(self, order: list[int], reader: SourceReader, crew: Crew, buffers: Buffers) -> None:
        def work(place: int) -> None:
            refs = self.refs[place]
            tensor = StepTensor(side_by_side(readable(refs)), reader, crew, buffers, _CACHE // self.threads)
            # what is computed while it is read, as a folded adapter, is float32 and not rounded to its dtype
            found = measure(tensor, ["F32" if ref.is_computed else ref.dtype for ref in refs[1:]])
            if sum(tensor.nonfinite()):
                self.left_out.append((self.names[place], "has NaN or infinite numbers"))
            else:
                self.sums[place] = found
            self.digests[place] = tensor.source_digests()
            reader.release(refs)
            self.done[place] = self.sizes[place]

        crew.each(work, order, self.tick, alone=1)

    def _by_matrix(self, order: list[int], reader: SourceReader, crew: Crew) -> None:
        def work(place: int) -> None:
            if place in self.sums:
                noise = [model.rounding for model in self.sums[place].measures().models]
                self.spectra[place] = spectra(reader, self.refs[place], noise, self.seed)
            reader.release(self.refs[place])
            self.done[len(self.refs) + place] = _MATRIX_COST * self.sizes[place]

        crew.each(work, order, self.tick)

    def _sampled(self, matrices: int) -> frozenset[int]:
        """Matrices, as many of each role, at equal distances in its layers."""
        roles: dict[str, list[int]] = {}
        for place, refs in enumerate(self.refs):
            if len(refs[0].shape) == 2 and min(refs[0].shape) > 1:
                roles.setdefault(self.roles[place], []).append(place)
        left, found = matrices, set()
        for n, of_role in enumerate(sorted(roles.values(), key=len)):  # few first: what they leave goes to the others
            count = min(len(of_role), left // (len(roles) - n))
            found |= {of_role[i * len(of_role) // count] for i in range(count)}
            left -= count
        return frozenset(found)
