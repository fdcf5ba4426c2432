"""The only place that loads configs, tokenizers, models and adapters by transformers and peft.

pretrained.py  loading itself; nothing asks a question, and nothing comes from the network
complete.py    tensors that a checkpoint lacks, or has too many of, for the class it is loaded as
bottleneck.py  adapters of our own kind: put into a network, saved, loaded
libraries.py   what the libraries do that users should not notice
causal.py      whether a language model predicts each token from those before it alone

A test holds that no other file loads any of it.
"""

from merge.checkpoint.trust import (
    FLAG,
    code_that_ran,
    is_trusted,
    known_as,
    permission,
    refusal,
    remember_name,
    trusted_names,
    trusting,
)
from merge.loading.causal import alike_but_for_the_last, check_alike, check_causal, check_sees_no_later
from merge.loading.complete import check_stored
from merge.loading.pretrained import (
    CAUSAL,
    LoadedModel,
    adapter_settings,
    adapter_weights,
    check_needs,
    library,
    load_adapter,
    load_config,
    load_model,
    load_tokenizer,
    model_from_config,
    own_class,
)

__all__ = [
    "CAUSAL",
    "FLAG",
    "LoadedModel",
    "adapter_settings",
    "adapter_weights",
    "alike_but_for_the_last",
    "check_alike",
    "check_causal",
    "check_needs",
    "check_sees_no_later",
    "check_stored",
    "code_that_ran",
    "is_trusted",
    "known_as",
    "library",
    "load_adapter",
    "load_config",
    "load_model",
    "load_tokenizer",
    "model_from_config",
    "own_class",
    "permission",
    "refusal",
    "remember_name",
    "trusted_names",
    "trusting",
]
