"""The keys of each level of a recipe, with their values and help.

This table reads the recipe, and makes the tables of keys in docs/recipes.md and docs/mixtures.md. A new key is one line
here, and one where its value is used.
"""

from __future__ import annotations

from merge.dtypes import RECIPE_NAMES
from merge.recipe.model import ALIGN, COMPAT
from merge.schema.keys import Key

GATE_MODES = ("hidden", "hidden_avg", "cheap_embed", "random", "uniform_random", "zero")
PROMPTED = GATE_MODES[:3]  # modes that make the router from prompts

_DTYPES = tuple(RECIPE_NAMES)
_MODEL, _METHOD = "a model", "a method"

_parameters = Key(
    help="Parameters of the method: a value, a gradient or conditions each; the innermost level that has one wins.",
    takes="a mapping",
    page="methods.md#notation-and-common-parameters",
)
_base = Key(help="The model that task vectors are taken from, for methods that need one.", takes=_MODEL)
_model = Key(help="The model: a directory, a hub id, or MODEL+ADAPTER.", takes=_MODEL)
_statistics = Key("str", "The file that `merge statistics` made of this model, for regmean and fisher.", takes="a file")
_own_method = Key(help="The method here; by default that of the level around it.", takes=_METHOD, page="methods.md")

# What every kind of recipe has.
_dtype = Key(help="Dtype of the output; without it each tensor keeps its own.", choices=_DTYPES)
_out_dtype = Key(help="The same; takes precedence over dtype.", takes="as dtype")
_name = Key(
    help="Name in the model card, and name of the result for later documents.", takes="a name", page="pipelines.md"
)
_seed = Key(
    "int",
    "Seed of everything that is drawn at random; 0 by default.",
    low=0,
    high=(1 << 64) - 1,
    takes="integer below 2^64",
)
_allow = Key(
    help="Conditions that are errors unless they are listed here.",
    takes="a list of names",
    page="recipes.md#what-is-checked",
)
_compat = Key("str", "Accept the keys that this tool accepts and ignores, with a note.", COMPAT, page="mergekit.md")

OPEN_PLACE = ("search", "int", "choice")  # keys of a place that `merge search` fills; see eval/search/places.py

# Level -> its keys.
KEYS: dict[str, dict[str, Key]] = {
    "recipe": {
        "merge_method": Key(help="How the models are merged.", takes=_METHOD, page="methods.md"),
        "models": Key(help="Whole models; one of models, slices and modules is needed.", takes="a list"),
        "slices": Key(help="Ranges of layers, stacked in this order.", takes="a list", page="stacks.md"),
        "modules": Key(
            help="Parts of a multimodal model or an encoder-decoder, each merged by itself.",
            takes="a mapping of names",
            page="stacks.md#towers",
        ),
        "base_model": _base,
        "parameters": _parameters,
        "dtype": _dtype,
        "out_dtype": _out_dtype,
        "tokenizer_source": Key(
            help="The tokenizer of the output; the rows of all embeddings are put in its order.",
            takes="`base`, `union` or a model",
            page="vocabularies.md",
        ),
        "tokenizer": Key(
            help="The same, with rows for single tokens and padding.", takes="a mapping", page="vocabularies.md"
        ),
        "chat_template": Key(
            help="The output's chat template: the inputs' most common one, a known one, or your own.",
            takes="`auto`, a name or Jinja",
            page="vocabularies.md",
        ),
        "name": _name,
        "seed": _seed,
        "allow": _allow,
        "align": Key(
            "str",
            "Put the neurons and heads of models without a common base into one order first.",
            ALIGN,
            noun="way to align",
            page="recipes.md#models-without-a-common-base",
        ),
        "upscale": Key(help="Make a deeper model of one.", takes="a mapping", page="stacks.md#up-scaling"),
        "config_donor": Key(help="The model whose config the output gets; by default the base.", takes=_MODEL),
        "tokenizer_donor": Key(
            help="The model whose tokenizer files the output gets; by default the base.", takes=_MODEL
        ),
        "compat": _compat,
    },
    "mixture": {
        "base_model": Key(help="The model that gives attention, norms, embeddings, config, tokenizer.", takes=_MODEL),
        "experts": Key(help="The experts that the router chooses from.", takes="a list"),
        "shared_experts": Key(
            help="One more expert, which every token goes through, in layouts that have one.", takes="a list"
        ),
        "gate_mode": Key(
            help="Where the router comes from; hidden by default.", choices=GATE_MODES, page="mixtures.md#routers"
        ),
        "experts_per_token": Key("int", "Experts that a token goes through; 2 by default.", low=1),
        "architecture": Key(
            help="The layout of the output; by default the first that fits the models.",
            takes="a layout",
            page="mixtures.md#layouts",
        ),
        "attention": Key(
            help="Everything but the experts: the base's (default), the experts' mean, or a merge of the experts.",
            takes="`base`, `average` or a mapping",
        ),
        "reinit": Key(
            help="Draw a share of each expert's neurons again (Drop-Upcycling).",
            takes="a mapping",
            page="mixtures.md#where-experts-come-from",
        ),
        "dtype": _dtype,
        "out_dtype": _out_dtype,
        "name": _name,
        "seed": _seed,
        "allow": _allow,
        "compat": _compat,
    },
    "expert": {
        "source_model": Key(help="The model whose MLPs become the expert.", takes=_MODEL),
        "positive_prompts": Key(help="Prompts that the router should send to it.", takes="a list of strings"),
        "negative_prompts": Key(help="Prompts that it should not send to it.", takes="a list of strings"),
        "noise_scale": Key("float", "Standard deviation of normal noise added to its weights; 0 by default.", low=0),
        "residual_scale": Key("float", "Factor of its output, multiplied into its last matrix; 1 by default."),
    },
    "attention": {
        "merge_method": Key("str", "How the experts' attention, norms and embeddings are merged.", takes=_METHOD),
        "parameters": Key(help="Parameters of the method; weight is 1 unless given.", takes="a mapping"),
    },
    "reinit": {"ratio": Key("float", "The share of neurons that are drawn again.", low=0, high=1)},
    "model": {"model": _model, "parameters": _parameters, "statistics": _statistics},
    "slice": {
        "sources": Key(help="Models with ranges of equal length, merged with each other.", takes="a list"),
        "merge_method": _own_method,
        "base_model": _base,
        "parameters": _parameters,
    },
    "source": {
        "model": _model,
        "layer_range": Key(
            help="The layers from the first up to the end, which is not included.", takes="`[first, end]`"
        ),
        "parameters": _parameters,
        "statistics": _statistics,
    },
    "module": {
        "slices": Key(help="Ranges of layers, stacked in this order.", takes="a list"),
        "models": Key(help="Whole models; a module needs either this or slices.", takes="a list"),
        "merge_method": _own_method,
        "parameters": _parameters,
    },
    "upscale": {
        "overlap": Key("int", "Layers that both copies of the model have.", low=0),
        "layers": Key("int", "Layers of the result, in place of the overlap.", low=2),
        "insert_every": Key("int", "A copy of the last layer is inserted after every so many layers.", low=1),
        "zero_init": Key("bool", "Inserted layers change nothing before they are trained; true by default."),
    },
    "tokenizer": {
        "source": Key(help="As tokenizer_source; union by default.", takes="`base`, `union` or a model"),
        "tokens": Key(help="Where rows of single tokens come from.", takes="a mapping of tokens"),
        "pad_to_multiple_of": Key("int", "Rows of the output are a multiple of this.", low=1, high=1 << 20),
    },
    "token": {
        "source": Key(help="Where its row comes from.", takes="a model or a mapping"),
        "force": Key("bool", "Also for models that have the token; false by default."),
    },
    "token source": {
        "kind": Key("str", "The row of a token of a model, or zeros.", ("model_token", "zero")),
        "model": Key(help="The model that the row is taken from.", takes=_MODEL),
        "token": Key(help="The token in that model, by its text; or token_id.", takes="a token"),
        "token_id": Key("int", "The token in that model, by its number.", low=0),
    },
    "condition": {
        "filter": Key(help="A part of a tensor's name; without it the value is for all others.", takes="a string"),
        "value": Key(help="The value for tensors with it in their names.", takes="a value or a gradient"),
    },
    "reference": {
        "model": Key(help="The model, where a name alone is not enough.", takes="a directory, hub id or mapping"),
        "lora": Key(help="An adapter, folded in while it is read.", takes="a directory, hub id or mapping"),
        "override_architecture": Key("str", "Accepted with a note, and without effect."),
    },
    "model path": {
        "path": Key("str", "A directory or a hub id."),
        "revision": Key("str", "A branch, tag or commit of the hub."),
    },
}
# Keys of mergekit's schema that do nothing there: refused with the reason, not as unknown.
REFUSED: dict[str, dict[str, str]] = {
    "slice": {"residual_weight": "residual_weight has no effect in mergekit and none here; remove it"},
}
LEVELS = {
    "recipe": "the recipe",
    "mixture": "the recipe",
    "expert": 'an entry of "experts"',
    "attention": '"attention"',
    "reinit": '"reinit"',
    "model": 'an entry of "models"',
    "slice": 'an entry of "slices"',
    "source": 'an entry of "sources"',
    "module": "a module",
    "upscale": '"upscale"',
    "tokenizer": '"tokenizer"',
    "token": "a token",
    "token source": "a token's source",
    "condition": "a condition",
    "reference": "a model reference",
    "model path": "a model path",
}
