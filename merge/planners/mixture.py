"""build_mixture: a recipe with experts -> Plan. An ordinary plan: expert tensors are copies, or derived of one model.

Sparse upcycling (Komatsuzaki et al. 2022, arXiv:2212.05055): every MLP becomes the first projections of a router and
several MLPs. Everything else is planned as a recipe of its own, of the base alone or of the experts merged
(Branch-Train-MiX, Sukhbaatar et al. 2024, arXiv:2403.07816), and its steps are taken over.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import merge.output
from merge.architecture import Stack
from merge.dtypes import torch_name
from merge.errors import Problem, RecipeError
from merge.methods import get_method
from merge.output.card import model_card
from merge.output.config import output_config
from merge.output.shards import INDEX, index_text, lay_out
from merge.plan import Derived, Experts, Plan, SideFile, Step, TensorRef
from merge.planners.build import RECIPE_FILE, build_plan
from merge.planners.inputs import Inputs
from merge.planners.moe_layouts import LAYOUTS, PROJECTIONS, Counts, MoeLayout, moe_config, settled, window_of
from merge.planners.router import Router, random_key
from merge.recipe.mixture import PROMPTED, Expert, Mixture
from merge.recipe.model import Recipe, Source

EMBEDDING, NORM, HEAD = "model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"
_DEAD_NEURONS = 128  # of a shared expert of zeros, where the layout asks for one and the recipe has none
_STACK = "model.layers."


def build_mixture(recipe: Recipe, *, shard_bytes: int) -> Plan:
    """Makes the plan of a mixture of experts from config files and tensor headers.

    Raises:
        RecipeError: with every problem there is.
        CheckpointError: if a model cannot be opened.
    """
    mixture = recipe.mixture
    assert mixture is not None
    inputs = Inputs(recipe)
    layout = _layout(recipe, mixture, inputs)
    rest = build_plan(_rest(recipe, mixture), shard_bytes=shard_bytes)
    problems: list[Problem] = []
    builder = _Builder(recipe, mixture, inputs, layout, rest, problems)
    steps = list(builder.steps()) if not problems else []
    if problems:
        raise RecipeError(problems)
    placed, shards = lay_out(steps, shard_bytes)
    experts = builder.experts(placed)
    checkpoint_notes = [f"{model.ref.text}: {note}" for model in inputs.all for note in model.checkpoint.notes]
    return dataclasses.replace(
        rest,
        method=rest.method if rest.method_origin else "mixture",
        models=tuple(model.source_model() for model in inputs.all),
        base_model=0,
        steps=placed,
        shards=shards,
        side_files=builder.side_files(placed, index_text(placed, shards)),
        notes=tuple(dict.fromkeys((*rest.notes, *checkpoint_notes, *builder.notes))),
        recipe_text=recipe.text,
        experts=experts,
    )


def _rest(recipe: Recipe, mixture: Mixture) -> Recipe:
    """The recipe of all that is not an expert: the base as it is, or the experts merged."""
    assert recipe.base_model is not None
    if recipe.merge_method == "passthrough":
        return dataclasses.replace(recipe, mixture=None, models=(Source(recipe.base_model),), base_model=None)
    return dataclasses.replace(recipe, mixture=None, models=recipe.models[: len(mixture.experts)])


def _layout(recipe: Recipe, mixture: Mixture, inputs: Inputs) -> MoeLayout:
    """The layout that is asked for, or else fits the models; RecipeError if some model does not fit it."""
    family = inputs.donor.config.get("model_type")
    known = ", ".join(dict.fromkeys(each for layout in LAYOUTS.values() for each in layout.families))
    name = mixture.architecture
    if name in (None, "qwen"):
        name = _default_layout(str(family), mixture, name == "qwen")
    if name is None:
        message = (
            f'no mixture of experts is known for the architecture "{family}" of {inputs.donor.ref.text}; '
            f"dense models that can become experts: {known}."
        )
        raise RecipeError(Problem(message, recipe.where("base_model")))
    layout = LAYOUTS[name]
    problems = [
        Problem(
            f'{layout.title} has experts of {" or ".join(layout.families)}, and {model.ref.text} is "{kind}".',
            recipe.where("architecture" if mixture.architecture else "experts"),
            f"Dense models that can become experts of some architecture: {known}." if str(kind) not in known else None,
        )
        for model in inputs.all
        if (kind := model.config.get("model_type")) not in layout.families
    ]
    if len(mixture.shared) > layout.most_shared:
        takes = "no shared expert" if layout.most_shared == 0 else "at most one shared expert"
        hint = "architecture: qwen and deepseek have one." if layout.title == "Mixtral" else None
        message = f"{layout.title} has {takes}, and {len(mixture.shared)} are listed."
        problems.append(Problem(message, recipe.where("shared_experts"), hint))
    if not layout.shared_gate and any(expert.positive for expert in mixture.shared):
        message = f"the shared expert of {layout.title} has no gate, so its prompts would have no effect."
        problems.append(Problem(message, recipe.where("shared_experts"), "Remove them, or set architecture: qwen."))
    if problems:
        raise RecipeError(problems)
    return layout


def _default_layout(family: str, mixture: Mixture, qwen: bool) -> str | None:
    if family == "qwen3":
        return "qwen3_moe"
    if family == "qwen2" or (qwen and family in LAYOUTS["qwen2_moe"].families):
        return "qwen2_moe"
    if family not in LAYOUTS["mixtral"].families:
        return "qwen2_moe" if qwen else None
    if not mixture.shared:
        return "mixtral"
    return "qwen2_moe" if any(expert.positive for expert in mixture.shared) else "deepseek"


class _Builder:
    """Turns the steps of the rest and the experts' tensors into one list of steps."""

    def __init__(
        self,
        recipe: Recipe,
        mixture: Mixture,
        inputs: Inputs,
        layout: MoeLayout,
        rest: Plan,
        problems: list[Problem],
    ) -> None:
        self.recipe, self.mixture, self.inputs, self.layout, self.problems = recipe, mixture, inputs, layout, problems
        self.name = rest.name
        self.notes: list[str] = []
        self.rest = self._fitting(rest.steps)
        self.base = inputs.donor
        stack = self.base.main
        self.n_layers = stack.n_layers if stack is not None and stack.prefix == _STACK else 0
        self.config = settled(self.base.config)
        self.models = [inputs.place(source.model) for source in recipe.models]
        self.neurons = 0
        self._check_base()
        if not problems:
            self._check_experts()
        if not problems:
            self.router = Router(recipe, mixture, self.base, layout, self.n_layers, problems)
            self._note_sizes()

    # Whether all fits.

    def _fitting(self, steps: Sequence[Step]) -> list[Step]:
        """The steps of the rest without its MLPs; a tensor that the layout has no place for is a problem."""
        stack = Stack(_STACK, 1)
        kept: list[Step] = []
        strange: list[str] = []
        buffers = 0
        for step in steps:
            place = stack.layer(step.name)
            suffix = place[1] if place else ""
            if suffix.endswith("rotary_emb.inv_freq"):
                buffers += 1
            elif step.name in (EMBEDDING, NORM, HEAD) or suffix in self.layout.suffixes:
                kept.append(step)
            elif not (suffix.startswith("mlp.") and suffix.split(".")[1] in PROJECTIONS and suffix.endswith(".weight")):
                strange.append(step.name)
        if strange:
            more = f" and {len(strange) - 1} more like it" if len(strange) > 1 else ""
            message = f"{self.layout.title} has no place for this tensor{more}."
            self.problems.append(Problem(message, strange[0], "It would compute something else without."))
        if buffers:
            self.notes.append(f"{buffers} rotary_emb.inv_freq tensors are not written: they follow from the config")
        return kept

    def _check_base(self) -> None:
        base, title = self.base.ref.text, self.layout.title
        if self.n_layers == 0:
            message = f"{base} has no layers named {_STACK}0, {_STACK}1 ... that its config confirms."
            self.problems.append(Problem(message, self.recipe.where("base_model")))
            return
        names = {step.name: None for step in self.rest}
        wanted = [EMBEDDING, NORM, *(f"{_STACK}{i}.{s}" for i in range(self.n_layers) for s in self.layout.suffixes)]
        lacking = [n for n in wanted if n not in names and not n.endswith(self.layout.zero_biases or "\0")]
        if lacking:
            more = f" and {len(lacking) - 1} more" if len(lacking) > 1 else ""
            self.problems.append(Problem(f"missing from {base}{more}; {title} needs it.", lacking[0]))
        width = self.config["hidden_size"] // self.config["num_attention_heads"]
        if self.config["head_dim"] != width and not self.layout.head_dim:
            message = f"{title} has heads of hidden_size / num_attention_heads = {width}, and {base} has head_dim "
            hint = "architecture: mixtral can have them." if "llama" in self.layout.families else None
            self.problems.append(Problem(f"{message}{self.config['head_dim']}.", self.recipe.where("base_model"), hint))
        for model in self.inputs.all:
            if (activation := model.config.get("hidden_act") or "silu") not in ("silu", "swish"):
                message = f"{model.ref.text} has hidden_act {activation}, and experts of {title} are gated by silu."
                self.problems.append(Problem(message, self.recipe.where("experts")))
        if window_of(self.config).is_mixed and not self.layout.mixed_window:
            message = f"some layers of {base} attend to a window and some to everything; {title} has one kind of layer."
            self.problems.append(Problem(message, self.recipe.where("base_model")))

    def _check_experts(self) -> None:
        """Every expert has the MLPs of the base's layers, of the base's width and as many neurons as the others."""
        hidden = self.config["hidden_size"]
        first = next(iter(self._sources(0)))[1]
        self.neurons = first.shape[0] if first is not None and len(first.shape) == 2 else 0
        for number, model in enumerate(self.models):
            name, where = self.inputs.all[model].ref.text, self._where(number)
            lacking = [tensor for tensor, ref in self._sources(number) if ref is None]
            wrong = [
                (tensor, ref.shape, self._shape(tensor, hidden))
                for tensor, ref in self._sources(number)
                if ref is not None and ref.shape != self._shape(tensor, hidden)
            ]
            if lacking:
                more = f" and {len(lacking) - 1} more" if len(lacking) > 1 else ""
                self.problems.append(Problem(f"{name} has no {lacking[0]}{more}.", where))
            elif wrong:
                tensor, found, expected = wrong[0]
                message = f"{name}: {tensor} is {list(found)}, and {list(expected)} is needed beside the other experts."
                self.problems.append(Problem(message, where, "All experts must have the same sizes."))
            more_layers = (self.inputs.all[model].main or Stack("", 0)).n_layers
            if not lacking and more_layers != self.n_layers:
                message = f"{name} has {more_layers} layers, and the base {self.base.ref.text} has {self.n_layers}."
                self.problems.append(Problem(message, where))
            biases = [each for each in self.inputs.all[model].tensors if ".mlp." in each and each.endswith(".bias")]
            if biases:
                message = f"{name}: experts of {self.layout.title} have no biases, and there is {biases[0]}."
                self.problems.append(Problem(message, where))

    def _where(self, number: int) -> str | None:
        line = self.recipe.models[number].line
        return f"{self.recipe.file}:{line}" if self.recipe.file else f"line {line}"

    def _shape(self, tensor: str, hidden: int) -> tuple[int, int]:
        return (hidden, self.neurons) if tensor.endswith("down_proj.weight") else (self.neurons, hidden)

    def _sources(self, number: int) -> Iterator[tuple[str, TensorRef | None]]:
        """Every MLP tensor of the base's layers, and where an expert has it."""
        tensors = self.inputs.all[self.models[number]].tensors
        for layer in range(self.n_layers):
            for projection in PROJECTIONS:
                name = f"{_STACK}{layer}.mlp.{projection}.weight"
                yield name, tensors.get(name)

    def _note_sizes(self) -> None:
        n = len(self.mixture.experts)
        if n & (n - 1):
            self.notes.append(f"{n} experts are not a power of two, which llama.cpp and some kernels ask for")
        places = self.models[:n]
        changed = self.mixture.reinit > 0 or any(expert.noise_scale for expert in self.mixture.experts)
        if n > 1 and len(set(places)) == 1 and not changed:
            said = "all experts are the same model: the mixture computes what one of them does until it is trained"
            self.notes.append(said)
        if self.layout.needs_shared and not self.mixture.shared:
            self.notes.append(
                f"{self.layout.title} always has a shared expert; without shared_experts it gets one of "
                f"{_DEAD_NEURONS} neurons that are zero"
            )
        elif self.layout.shared_gate and self.mixture.gate_mode in PROMPTED and not self.mixture.shared[0].positive:
            self.notes.append("the shared expert has no prompts, so its gate is zero: half of it is always added")
        if self.layout.files:
            self.notes.append(
                f"transformers has no {self.layout.title}: the result brings its code "
                f"({', '.join(self.layout.files)}), and loads with trust_remote_code=True"
            )

    # The steps.

    def steps(self) -> Iterator[Step]:
        """In the order of the computation: embedding, layers with their experts, norm and head."""
        stack = Stack(_STACK, self.n_layers)
        layers: list[list[Step]] = [[] for _ in range(self.n_layers)]
        outside: dict[str, Step] = {}
        for step in self.rest:
            place = stack.layer(step.name)
            if place is None:
                outside[step.name] = step
            else:
                layers[place[0]].append(step)
        yield outside[EMBEDDING]
        for layer, steps in enumerate(layers):
            yield from steps
            yield from self._zero_biases(layer, {step.name: None for step in steps})
            yield from self._block(layer)
        yield outside[NORM]
        if HEAD in outside:
            yield outside[HEAD]
        elif not self.layout.ties:
            yield dataclasses.replace(outside[EMBEDDING], name=HEAD)

    def _zero_biases(self, layer: int, there: dict[str, None]) -> Iterator[Step]:
        for suffix in self.layout.zero_biases:
            name = f"{_STACK}{layer}.{suffix}"
            if name not in there:
                heads = "num_attention_heads" if "q_proj" in suffix else "num_key_value_heads"
                yield self._zeros(name, (self.config[heads] * self.config["head_dim"],), self._dtype(layer))

    def _block(self, layer: int) -> Iterator[Step]:
        """Router, experts and shared expert of a layer."""
        at, dtype = f"{_STACK}{layer}.", self._dtype(layer)
        gate = f"{at}{self.layout.block}.gate.weight"
        yield self._made(gate, self.router.gate(gate, layer, dtype), dtype)
        for number in range(len(self.mixture.experts)):
            for projection in PROJECTIONS:
                yield self._expert(layer, number, projection, f"{at}{self.layout.expert(number, projection)}")
        if self.layout.shared_gate:
            name = f"{at}{self.layout.block}.shared_expert_gate.weight"
            yield self._made(name, self.router.shared_gate(name, layer, dtype), dtype)
        if self.mixture.shared:
            number = len(self.mixture.experts)
            for projection in PROJECTIONS:
                yield self._expert(layer, number, projection, f"{at}{self.layout.shared_expert(projection)}")
        elif self.layout.needs_shared:
            hidden = self.config["hidden_size"]
            for projection in PROJECTIONS:
                shape = (hidden, _DEAD_NEURONS) if projection == "down_proj" else (_DEAD_NEURONS, hidden)
                yield self._zeros(f"{at}{self.layout.shared_expert(projection)}", shape, dtype)

    def _expert(self, layer: int, number: int, projection: str, name: str) -> Step:
        source = f"{_STACK}{layer}.mlp.{projection}.weight"
        model = self.models[number]
        expert = (*self.mixture.experts, *self.mixture.shared)[number]
        ref = self._changed(self.inputs.all[model].tensors[source], expert, number, layer, projection, name)
        dtype = self._dtype(layer, projection)
        parameters: dict[str, Any] = {}
        if projection == "down_proj" and expert.residual_scale != 1.0:
            parameters["scale"] = (expert.residual_scale,)
        plain = ref.dtype == dtype and ref.strides is None and ref.is_exact and not parameters
        method = "copy" if plain else "passthrough"
        return Step(name, ref.shape, dtype, "", 0, method, (ref,), (model,), parameters=parameters)

    def _changed(
        self, ref: TensorRef, expert: Expert, number: int, layer: int, projection: str, name: str
    ) -> TensorRef:
        """The tensor with some neurons drawn anew, and with noise, where the recipe wants it."""
        seed, ratio = self.recipe.seed, self.mixture.reinit
        if ratio and number < len(self.mixture.experts):
            parameters = {
                "neurons": random_key(seed, f"neurons of layer {layer}", number),
                "key": random_key(seed, f"{name} anew", number),
                "axis": 1 if projection == "down_proj" else 0,
                "ratio": ratio,
            }
            ref = _derived(ref, "reinitialised", f"{ref.name} (expert {number}, partly new)", parameters)
        if expert.noise_scale:
            key = random_key(seed, f"{name} noise", number)
            parameters = {"key": key, "scale": expert.noise_scale}
            ref = _derived(ref, "noisy", f"{ref.name} with noise (expert {number})", parameters)
        return ref

    def _zeros(self, name: str, shape: tuple[int, ...], dtype: str) -> Step:
        ref = TensorRef("", f"{name} (zeros)", dtype, shape, 0, derived=Derived("zeros", ()))
        return self._made(name, ref, dtype)

    def _made(self, name: str, ref: TensorRef, dtype: str) -> Step:
        return Step(name, ref.shape, dtype, "", 0, "passthrough", (ref,), (0,))

    def _dtype(self, layer: int, projection: str = "gate_proj") -> str:
        """The recipe's, or the base's for its MLP."""
        chosen = self.recipe.out_dtype or self.recipe.dtype
        if chosen is not None:
            return chosen
        name = f"{_STACK}{layer}.mlp.{projection}.weight"
        ref = self.base.tensors.get(name) or self.inputs.all[self.models[0]].tensors[name]
        return "BF16" if ref.scale is not None else ref.dtype

    # What the plan says besides.

    def experts(self, steps: Sequence[Step]) -> Experts:
        per_expert = 3 * self.neurons * self.config["hidden_size"]
        idle = len(self.mixture.experts) - self.mixture.experts_per_token
        return Experts(
            layout=self.layout.title,
            n_experts=len(self.mixture.experts),
            n_shared=len(self.mixture.shared),
            per_token=self.mixture.experts_per_token,
            n_layers=self.n_layers,
            active=sum(step.size for step in steps) - self.n_layers * idle * per_expert,
            gates=self.router.gates,
        )

    def side_files(self, steps: Sequence[Step], index: str | None) -> tuple[SideFile, ...]:
        shared = self.neurons if self.mixture.shared else _DEAD_NEURONS
        n_experts, n_shared = len(self.mixture.experts), len(self.mixture.shared)
        counts = Counts(n_experts, n_shared, self.mixture.experts_per_token, self.neurons, shared)
        tied = not any(step.name == HEAD for step in steps)
        dtype = next(step.dtype for step in steps if step.name.endswith("gate.weight"))
        embedding = next(step for step in steps if step.name == EMBEDDING)
        config = output_config(
            moe_config(self.layout, self.config, counts),
            dtype=torch_name(dtype),
            tied=tied,
            vocabulary=embedding.shape[0],
            layers=None,
        )
        method = get_method(self.recipe.merge_method)
        assert method is not None
        name = self.name
        models = [model.source_model() for model in self.inputs.all]
        home = Path(merge.output.__path__[0])
        made = {
            "README.md": model_card(self.recipe, name, method, models, 0),
            "config.json": config,
            RECIPE_FILE: self.recipe.text,
            **{file: (home / file).read_text(encoding="utf-8") for file in self.layout.files},
        }
        if index is not None:
            made[INDEX] = index
        keeper = self.base.checkpoint
        copied = [SideFile(file, source=f"{keeper.path}/{file}") for file in keeper.side_files() if file not in made]
        return (*copied, *(SideFile(file, text=text) for file, text in made.items()))


def _derived(ref: TensorRef, operation: str, name: str, parameters: dict[str, Any]) -> TensorRef:
    dtype = "BF16" if ref.scale is not None else ref.dtype
    return TensorRef("", name, dtype, ref.shape, 0, derived=Derived(operation, (ref,), parameters))
