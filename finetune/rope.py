"""Extends the context of a model by scaling its rotary position embeddings.

linear   positions are divided by the factor (Chen et al. 2023, arXiv:2306.15595)
dynamic  the base frequency grows with the text beyond the old context (NTK-aware scaling, as in transformers)
yarn     between the two by frequency, with a temperature of attention (Peng et al. 2023, arXiv:2309.00071)

The computation is that of transformers (`rope_parameters` in config.json); this writes it there, so that the result
loads with the new context everywhere. linear and yarn change what the model computes from the first token on, so the
model should be trained on longer texts; dynamic leaves texts within the old context as they were.
"""

from __future__ import annotations

import copy
import dataclasses

from finetune.keys import Config
from finetune.models import Base
from merge.errors import UsageError


def scale_rope(base: Base, config: Config) -> Base:
    """The base with the context and config.json for `rope_scaling`.

    Raises:
        UsageError: the model has no rotary embeddings, several kinds, or is scaled already.
    """
    if config.rope_scaling is None:
        return base
    scaled = copy.deepcopy(base.config)
    text = scaled.get_text_config()
    found = getattr(text, "rope_parameters", None)
    if not found or base.context is None:
        raise UsageError(f"rope_scaling: {base.path} has no rotary position embeddings to scale (no rope_parameters).")
    if "rope_theta" not in found:
        raise UsageError("rope_scaling: this model has other rotary embeddings in each kind of layer; not supported.")
    if found.get("rope_type", "default") != "default":
        raise UsageError(
            f"rope_scaling: {base.path} is scaled already (rope_type {found['rope_type']}, factor "
            f"{found.get('factor')}). Start from the model as it was before."
        )
    context = round(base.context * config.rope_factor)
    parameters = {**found, "rope_type": config.rope_scaling, "factor": config.rope_factor}
    if config.rope_scaling == "yarn":
        parameters["original_max_position_embeddings"] = base.context
    # dynamic scaling takes the old context for its measure, and reads it in max_position_embeddings
    text.max_position_embeddings = base.context if config.rope_scaling == "dynamic" else context
    text.rope_parameters = parameters
    return dataclasses.replace(base, config=scaled, context=context)
