"""Asks transformers about a class of models, by building it on the meta device without weights.

Importing transformers takes seconds, so merges ask only for classes that table.json does not have. The table itself is
made by these functions (benchmarks/architecture_table.py).
"""

from __future__ import annotations

import contextlib
import re
import warnings
from collections.abc import Callable, Container, Iterator, Mapping
from typing import TYPE_CHECKING, Any
from unittest import mock

from merge.architecture.facts import Architecture, PerLayer, Rename, Tie
from merge.architecture.stacks import LAYER_COUNT_KEYS

if TYPE_CHECKING:
    from torch.nn import Module
    from transformers import PreTrainedConfig, PreTrainedModel

_SAID = (None, False, True)
_NUMBER = re.compile(r"\.\d+\.")


def ask(name: str, config: Mapping[str, Any] | None = None) -> Architecture:
    """Facts about a class from the installed transformers.

    Args:
        name: of the class, e.g. "LlamaForCausalLM".
        config: config.json of the model in question; None: the class's default, with two layers.

    Raises:
        Exception: anything, if transformers lacks the class or cannot build it from this config.
    """
    from merge.loading import library

    cls = getattr(library(), name)
    values = _plain(config) if config is not None else _default(cls)
    with _quietly():
        model = _built(cls, values)
        fixed = sorted(_fixed_lists(model.config))
        return Architecture(
            name=name,
            prefix=model.base_model_prefix or "",
            embedding=_name_of(model, "get_input_embeddings"),
            head=_name_of(model, "get_output_embeddings"),
            ties=tuple(_ties(model, cls, values)),
            unread=tuple(_unread(model)),
            float32=tuple(_float32(model)),
            float32_of_half=tuple(sorted(model._keep_in_fp32_modules or ())),
            renames=tuple(_renames(model)),
            fixed_lists=tuple(fixed),
            **_layers(model, cls, values, fixed),
        )


@contextlib.contextmanager
def _quietly() -> Iterator[None]:
    from transformers.utils import logging

    level = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        with warnings.catch_warnings(), _without_timm():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.set_verbosity(level)


def _without_timm() -> contextlib.AbstractContextManager[object]:
    """Leaves image towers of timm empty (Gemma 3n); they are not needed, and timm need not be installed."""
    import torch
    from transformers.models.timm_wrapper import modeling_timm_wrapper as wrapper

    return mock.patch.multiple(
        wrapper,
        requires_backends=lambda *args: None,
        _create_timm_model_with_error_handling=lambda *args, **kwargs: torch.nn.Identity(),
    )


def _plain(config: Mapping[str, object]) -> dict[str, object]:
    """The config for loading a model in bfloat16, without its quantisation."""
    kept = {key: value for key, value in config.items() if key not in ("quantization_config", "torch_dtype")}
    return {**kept, "dtype": "bfloat16"}


def _default(cls: type[PreTrainedModel]) -> dict[str, object]:
    """The default config of a class, with two layers if the class can be built like that."""
    values = _plain(cls.config_class().to_dict())
    with _quietly():
        small = _with_layers(values, lambda count: 2, _fixed_lists(cls.config_class()))
        for choice in (small, _filled(small)):
            with contextlib.suppress(Exception):
                _built(cls, choice)
                return choice
    return values


def _filled(values: Mapping[str, object]) -> dict[str, object]:
    """The config with values for sizes that only real configs have."""
    heads = values.get("num_attention_heads") or 2
    sizes = {"num_key_value_heads": heads, "head_dim": 8}
    return {**values, **{key: size for key, size in sizes.items() if key in values and values[key] is None}}


def _with_layers(values: Mapping[str, Any], change: Callable[[int], int], fixed: Container[str]) -> dict[str, Any]:
    """The config with other numbers of layers; lists as long as there were layers, if not in `fixed`, follow."""
    counts = [key for key in (*LAYER_COUNT_KEYS, "num_encoder_layers") if isinstance(values.get(key), int)]
    old = {values[key] for key in counts}
    changed: dict[str, Any] = {}
    for key, value in values.items():
        if key == "per_layer_config":  # Gemma 4: by layer number, which the defaults do without
            continue
        if isinstance(value, Mapping):
            changed[key] = _with_layers(value, change, fixed)
        elif key in counts:
            changed[key] = change(value)
        elif isinstance(value, list) and len(value) in old and value and key not in fixed:
            changed[key] = [value[i % len(value)] for i in range(change(len(value)))]
        else:
            changed[key] = value
    return changed


def _built(cls: type[PreTrainedModel], values: Mapping[str, object]) -> PreTrainedModel:
    """The model without weights, as transformers builds it for bfloat16."""
    import torch

    config = cls.config_class.from_dict(dict(values))
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device("meta"):
            return cls(config)
    finally:
        torch.set_default_dtype(before)


def _name_of(model: Module, getter: str) -> str | None:
    """Name of the weight of the input or output embeddings."""
    try:
        wanted = getattr(model, getter)()
    except (NotImplementedError, AttributeError):
        return None
    if getattr(wanted, "weight", None) is None:
        return None
    modules = model.named_modules(remove_duplicate=False)
    return next((f"{name}.weight" for name, module in modules if module is wanted), None)


# Ties.


def _ties(model: Module, cls: type[PreTrainedModel], values: Mapping[str, object]) -> Iterator[Tie]:
    """Every pair that transformers ties if the config says so, including pairs of submodels."""
    from transformers import PreTrainedModel

    known = model.state_dict().keys()
    found: dict[str, Tie] = {}
    for prefix, module in model.named_modules(remove_duplicate=False):
        if not isinstance(module, PreTrainedModel) or not module._tied_weights_keys:
            continue
        section = _section(model.config, module.config)
        said = getattr(module.config, "tie_word_embeddings", None)
        module.config.tie_word_embeddings = True
        pairs = module.get_expanded_tied_weights_keys(all_submodels=False)
        module.config.tie_word_embeddings = said
        flags = _flags(cls, values, section) if pairs else ""
        for target, source in pairs.items():
            first, second = (f"{prefix}.{name}" if prefix else name for name in (target, source))
            if first in known and second in known and "1" in flags:
                found.setdefault(first, Tie(first, second, section or _text_section(model.config), flags))
    yield from found.values()


def _section(whole: object, part: object, path: str = "") -> str:
    """The section of a submodel's config in the model's; "" for the model's own or a copy of it."""
    if part is whole:
        return path
    for key in getattr(whole, "sub_configs", None) or ():
        sub = getattr(whole, key, None)
        if sub is not None and (found := _section(sub, part, f"{path}.{key}" if path else key)):
            return found
    return ""


def _text_section(config: PreTrainedConfig) -> str:
    text = config.get_text_config(decoder=True)
    return "" if text is config else _section(config, text)


def _flags(cls: type[PreTrainedModel], values: Mapping[str, object], section: str) -> str:
    """Whether the tie holds, "1" or "0", for each of nothing, false, true at the top and of the same in the section.

    Where the flag is read: in `section`, or at the top, which some configs set by their text part.
    """
    part = section or _text_section(cls.config_class.from_dict(dict(values)))
    return "".join(
        _holds(cls, _saying(_saying(values, "", top), part, inner) if part else _saying(values, "", top), section)
        for top in _SAID
        for inner in _SAID
    )


def _holds(cls: type[PreTrainedModel], values: Mapping[str, object], section: str) -> str:
    try:
        config = cls.config_class.from_dict(dict(values))
    except Exception:  # a config that does not allow it
        return "0"
    for key in filter(None, section.split(".")):
        config = getattr(config, key)
    return "1" if getattr(config, "tie_word_embeddings", False) else "0"


def _saying(values: Mapping[str, object], section: str, flag: bool | None) -> dict[str, object]:
    """The config with the flag of a section set, or taken out."""

    def change(part: Mapping[str, object]) -> dict[str, object]:
        kept = {key: value for key, value in part.items() if key not in ("tie_word_embeddings", "tie_embedding")}
        return kept if flag is None else {**kept, "tie_word_embeddings": flag}

    return _in_section(values, section, change)


def _in_section(
    values: Mapping[str, Any], section: str, change: Callable[[Mapping[str, Any]], dict[str, Any]]
) -> dict[str, Any]:
    """The config with a section of it changed; "" is the whole."""
    if not section:
        return change(values)
    first, _, rest = section.partition(".")
    return {**values, first: _in_section(values.get(first) or {}, rest, change)}


# Names and dtypes.


def _unread(model: Module) -> Iterator[str]:
    """Patterns of keys that loading ignores or computes: narrowed where they would take weights of the model's own.

    transformers applies them only to what the model lacks. Layers by number ("layers.61") are left to the config.
    """
    own = list(model.state_dict())
    patterns = {
        *(model._keys_to_ignore_on_load_unexpected or ()),
        *(model._keys_to_ignore_on_load_missing or ()),
        *(re.escape(key) for key in model._keys_to_ignore_on_save or ()),
    }
    computed = {*(model._keys_to_ignore_on_load_missing or ()), *(model._keys_to_ignore_on_save or ())}
    for pattern in sorted(patterns):
        if re.search(r"layers\\?\.\d", pattern):
            continue
        narrow = rf"(^|\.){pattern}$"
        for choice in (pattern, narrow):
            if pattern in computed or not any(re.search(choice, name) for name in own):
                yield choice
                break


def _float32(model: Module) -> Iterator[str]:
    """Patterns of parameters that stay float32 in a model loaded as bfloat16."""
    import torch

    yield from sorted(model._keep_in_fp32_modules_strict or ())
    kept = [re.compile(pattern) for pattern in model._keep_in_fp32_modules_strict or ()]
    ends: dict[str, None] = {}
    for name, value in model.state_dict().items():
        if value.dtype == torch.float32 and not any(pattern.search(name) for pattern in kept):
            ends[".".join(_NUMBER.split(name)[-1].split(".")[-2:])] = None
    yield from (rf"(^|\.){re.escape(end)}$" for end in sorted(ends))


def _renames(model: Module) -> Iterator[Rename]:
    """Names on the disk -> names in the model, in the order in which transformers applies them."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import GroupWeightRename, Inkling2IndexOffsetWeightRename, WeightRenaming

    for transform in get_model_conversion_mapping(model):
        kinds = (GroupWeightRename, Inkling2IndexOffsetWeightRename)  # depend on other names, or count
        if not isinstance(transform, WeightRenaming) or isinstance(transform, kinds):
            continue
        scopes: tuple[str, ...] = ("",)
        if transform.scope_prefix is not None:
            base = f"{transform.base_model_prefix}." if transform.base_model_prefix else ""
            scopes = (f"{base}{transform.scope_prefix}.", f"{transform.scope_prefix}.")
        pattern: str = transform.compiled_sources.pattern
        if len(transform.source_patterns) == 1:
            pattern = pattern.removeprefix("(?P<g0>").removesuffix(")")
        yield Rename(pattern, transform.target_patterns[0], tuple(dict.fromkeys(scopes)))


def _layers(
    model: Module, cls: type[PreTrainedModel], values: Mapping[str, Any], fixed: Container[str]
) -> dict[str, Any]:
    """Lists of modules and tensors that grow with the number of layers; peculiarities of the first layer."""
    section = _text_section(model.config)
    deeper = _in_section(values, section, lambda part: _with_layers(part, lambda count: count + 1, fixed))
    try:
        others = {name: tuple(value.shape) for name, value in _built(cls, deeper).state_dict().items()}
    except Exception:
        return {}
    shapes = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    stacks = tuple(dict.fromkeys(_before_number(name) for name in others if name not in shapes))
    return {
        "stacks": tuple(stack for stack in stacks if stack),
        "per_layer": tuple(
            PerLayer(name, axes[0])
            for name, shape in shapes.items()
            if len(others.get(name, ())) == len(shape)
            and len(axes := [i for i, (a, b) in enumerate(zip(shape, others[name], strict=True)) if a != b]) == 1
        ),
        "first_layer": tuple(name for stack in stacks if stack for name in _special(stack, list(others))),
    }


def _before_number(name: str) -> str:
    match = _NUMBER.search(name)
    return name[: match.start() + 1] if match else ""


def _special(stack: str, names: list[str]) -> Iterator[str]:
    """Tensors that only the first of three layers has, after a "+", or lacks, after a "-"."""
    first, second, third = (
        {name.removeprefix(f"{stack}{layer}.") for name in names if name.startswith(f"{stack}{layer}.")}
        for layer in range(3)
    )
    if second == third and first and second and (first < second or second < first):
        yield from (f"+{stack}0.{suffix}" for suffix in sorted(first - second))
        yield from (f"-{stack}0.{suffix}" for suffix in sorted(second - first))


def _fixed_lists(config: PreTrainedConfig) -> set[str]:
    """Keys of lists that are not one value for each layer, by the default config of each section."""
    found: set[str] = set()
    for section in (config, *(getattr(config, key, None) for key in getattr(config, "sub_configs", None) or ())):
        if section is None:
            continue
        values = type(section)().to_dict()
        counts = {values[key] for key in LAYER_COUNT_KEYS if isinstance(values.get(key), int)}
        found |= {key for key, value in values.items() if isinstance(value, list | tuple) and len(value) not in counts}
    return found
