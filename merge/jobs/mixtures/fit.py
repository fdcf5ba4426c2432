"""Checks that the models of a recipe can become a mixture of experts, and chooses the layout."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from merge.architecture import Stack
from merge.dtypes import DTYPES
from merge.errors import Problem, RecipeError
from merge.jobs.mixtures.config import settled, window_of
from merge.moe_layouts import PROJECTIONS, MoeLayout, all_layouts
from merge.plan import Plan, Step, TensorRef
from merge.planning.inputs import Inputs
from merge.quoting import quoted
from merge.recipe.keys import PROMPTED
from merge.recipe.model import Mixture, Recipe

EMBEDDING, NORM, HEAD = "model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"
STACK = "model.layers."
DEAD_NEURONS = 128  # of a shared expert of zeros, for layouts that need one and recipes without one


def choose_layout(recipe: Recipe, mixture: Mixture, inputs: Inputs) -> MoeLayout:
    """The recipe's layout, or the first that fits the models; RecipeError if a model does not fit it."""
    family = inputs.donor.config.get("model_type")
    known = ", ".join(dict.fromkeys(each for layout in all_layouts().values() for each in layout.families))
    name = mixture.architecture
    if name in (None, "qwen"):
        name = _default_layout(str(family), mixture, name == "qwen")
    if name is None:
        message = (
            f'no mixture of experts is known for the architecture "{family}" of {inputs.donor.ref.text}; '
            f"dense models that can become experts: {known}."
        )
        raise RecipeError(Problem(message, recipe.where("base_model")))
    layout = all_layouts()[name]
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
        message = f"{layout.title} has {takes}, and the recipe lists {len(mixture.shared)}."
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
    if family == "qwen2" or (qwen and family in all_layouts()["qwen2_moe"].families):
        return "qwen2_moe"
    if family not in all_layouts()["mixtral"].families:
        fitting = (name for name, layout in all_layouts().items() if family in layout.families)
        return "qwen2_moe" if qwen else next(fitting, None)
    if not mixture.shared:
        return "mixtral"
    return "qwen2_moe" if any(expert.positive for expert in mixture.shared) else "deepseek"


class Dense:
    """The dense models, checked against the layout; raises RecipeError with every problem.

    Attributes:
        base: whose config and tokenizer the mixture gets.
        rest: the steps of all that is not an expert.
        config: of the base, with nothing left to defaults.
        models: index in Inputs.all of every expert, then of the shared ones.
        neurons: of each expert.
    """

    def __init__(self, recipe: Recipe, mixture: Mixture, inputs: Inputs, layout: MoeLayout, rest: Plan) -> None:
        self.recipe, self.mixture, self.inputs, self.layout = recipe, mixture, inputs, layout
        self.notes: list[str] = []
        self._problems: list[Problem] = []
        self.base = inputs.donor
        stack = self.base.main
        self.n_layers = stack.n_layers if stack is not None and stack.prefix == STACK else 0
        self.rest = self._fitting(rest.steps)
        self._check_config()
        self.config: dict[str, Any] = settled(self.base.config)
        self.models = [inputs.place(source.model) for source in recipe.models]
        self.neurons = 0
        self._check_base()
        if not self._problems:
            self._check_experts()
        if self._problems:
            raise RecipeError(self._problems)
        self._note_sizes()

    def dtype(self, layer: int, projection: str = "gate_proj") -> str:
        """The dtype of an MLP's tensor: the recipe's, or the base's."""
        chosen = self.recipe.out_dtype or self.recipe.dtype
        if chosen is not None:
            return chosen
        name = f"{STACK}{layer}.mlp.{projection}.weight"
        ref = self.base.tensors.get(name) or self.inputs.all[self.models[0]].tensors[name]
        return ref.dtype

    def _fitting(self, steps: Sequence[Step]) -> list[Step]:
        """The steps of the rest without its MLPs; tensors that the layout does not have are problems."""
        stack = Stack(STACK, self.n_layers or len(steps))
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
            self._problems.append(Problem(message, strange[0], "It would compute something else without."))
        if buffers:
            self.notes.append(f"{buffers} rotary_emb.inv_freq tensors are not written: they follow from the config")
        return kept

    def _check_config(self) -> None:
        """Sizes that all further checks need; without them, RecipeError at once."""
        for key in ("hidden_size", "num_attention_heads", "num_hidden_layers", "num_key_value_heads", "head_dim"):
            value = self.base.config.get(key)
            optional = value is None and key in ("num_key_value_heads", "head_dim")
            if not optional and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
                message = (
                    f"{self.base.checkpoint.path}/config.json: {key}: expected a whole number, "
                    f"found {quoted(value, 40)}."
                )
                raise RecipeError(Problem(message, self.recipe.where("base_model")))

    def _check_base(self) -> None:
        base, title = self.base.ref.text, self.layout.title
        if self.n_layers == 0 or self.n_layers != self.config["num_hidden_layers"]:
            message = f"{base} has no layers named {STACK}0, {STACK}1 ... that its config confirms."
            self._problems.append(Problem(message, self.recipe.where("base_model")))
            return
        names = {step.name: None for step in self.rest}
        wanted = [EMBEDDING, NORM, *(f"{STACK}{i}.{s}" for i in range(self.n_layers) for s in self.layout.suffixes)]
        family = self.config["model_type"]
        made = self.layout.zero_biases if family != self.layout.families[0] else ()  # of families without biases
        lacking = [name for name in wanted if name not in names and not name.endswith(made)]
        if lacking:
            more = f" and {len(lacking) - 1} more" if len(lacking) > 1 else ""
            self._problems.append(Problem(f"missing from {base}{more}; {title} needs it.", lacking[0]))
        hidden = self.config["hidden_size"]
        for step in self.rest:
            if step.name == EMBEDDING and (len(step.shape) != 2 or step.shape[1] != hidden):
                message = f"{base} has it as {list(step.shape)}, and its config a hidden_size of {hidden}."
                self._problems.append(Problem(message, EMBEDDING))
        width = self.config["hidden_size"] // self.config["num_attention_heads"]
        if self.config["head_dim"] != width and not self.layout.head_dim:
            message = f"{title} has heads of hidden_size / num_attention_heads = {width}, and {base} has head_dim "
            hint = "architecture: mixtral can have them." if "llama" in self.layout.families else None
            self._problems.append(
                Problem(f"{message}{self.config['head_dim']}.", self.recipe.where("base_model"), hint)
            )
        for model in self.inputs.all:
            if (activation := model.config.get("hidden_act") or "silu") not in ("silu", "swish"):
                message = f"{model.ref.text} has hidden_act {activation}, and experts of {title} are gated by silu."
                self._problems.append(Problem(message, self.recipe.where("experts")))
        if window_of(self.config).is_mixed and not self.layout.mixed_window:
            message = f"some layers of {base} attend to a window and some to everything; {title} has one kind of layer."
            self._problems.append(Problem(message, self.recipe.where("base_model")))

    def _check_experts(self) -> None:
        """Checks that every expert has an MLP for each layer, of the base's width and with equally many neurons."""
        hidden = self.config["hidden_size"]
        first = next(iter(self._sources(0)))[1]
        self.neurons = first.shape[0] if first is not None and len(first.shape) == 2 else 0
        for number in range(len(self.models)):
            self._problems += self._expert_problems(number, hidden)

    def _expert_problems(self, number: int, hidden: int) -> Iterator[Problem]:
        model, where = self.inputs.all[self.models[number]], self._where(number)
        name, sources = model.ref.text, list(self._sources(number))
        lacking = [tensor for tensor, ref in sources if ref is None]
        found = [(tensor, ref) for tensor, ref in sources if ref is not None]
        wrong = [(tensor, ref.shape) for tensor, ref in found if ref.shape != self._shape(tensor, hidden)]
        n_layers = (model.main or Stack("", 0)).n_layers
        if lacking:
            more = f" and {len(lacking) - 1} more" if len(lacking) > 1 else ""
            yield Problem(f"{name} has no {lacking[0]}{more}.", where)
        elif wrong and (self.neurons or number == 0):
            tensor, shape = wrong[0]
            needed = list(self._shape(tensor, hidden))
            message = f"{name}: {tensor} is {list(shape)}, and {needed} is needed beside the other experts."
            yield Problem(message, where, "All experts must have the same sizes.")
        if not lacking and n_layers != self.n_layers:
            yield Problem(
                f"{name} has {n_layers} layers, and the base {self.base.ref.text} has {self.n_layers}.", where
            )
        for tensor in [tensor for tensor, ref in found if not DTYPES[ref.dtype].is_float][:1]:
            message = f"{name}: {tensor} holds whole numbers; a quantized model cannot become an expert."
            yield Problem(message, where, "Name the model it was quantized from.")
        for tensor in [tensor for tensor in model.tensors if ".mlp." in tensor and tensor.endswith(".bias")][:1]:
            yield Problem(f"{name}: experts of {self.layout.title} have no biases, and there is {tensor}.", where)

    def _where(self, number: int) -> str | None:
        line = self.recipe.models[number].line
        return f"{self.recipe.file}:{line}" if self.recipe.file else f"line {line}"

    def _shape(self, tensor: str, hidden: int) -> tuple[int, int]:
        return (hidden, self.neurons) if tensor.endswith("down_proj.weight") else (self.neurons, hidden)

    def _sources(self, number: int) -> Iterator[tuple[str, TensorRef | None]]:
        """Every MLP tensor of the base's layers, and the expert's tensor for it."""
        tensors = self.inputs.all[self.models[number]].tensors
        for layer in range(self.n_layers):
            for projection in PROJECTIONS:
                name = f"{STACK}{layer}.mlp.{projection}.weight"
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
                f"{DEAD_NEURONS} neurons that are zero"
            )
        elif self.layout.shared_gate and self.mixture.gate_mode in PROMPTED and not self.mixture.shared[0].positive:
            self.notes.append("the shared expert has no prompts, so its gate is zero: half of it is always added")
        if self.layout.files:
            self.notes.append(
                f"transformers has no {self.layout.title}: the result brings its code "
                f"({', '.join(self.layout.files)}), and loads with trust_remote_code=True"
            )
