"""Structure of a checkpoint: its class, ties, names, layer stacks, embeddings and heads.

architecture_of gives transformers' facts about a class: ties, names, ignored tensors, float32 tensors. Layer
stacks are found in the tensors' names instead, as runs of numbers (`model.layers.0.` ... `model.layers.31.`) whose
length the config confirms, so that no list of architectures decides what can be stacked.
"""

from merge.architecture.facts import Architecture, PerLayer, Tie, config_section, flag_of
from merge.architecture.names import is_embedding, is_head, is_input_side, says_tied
from merge.architecture.stacks import LAYER_COUNT_KEYS, Stack, find_stacks, layer_counts, main_stack
from merge.architecture.table import architecture_of, class_of

__all__ = [
    "LAYER_COUNT_KEYS",
    "Architecture",
    "PerLayer",
    "Stack",
    "Tie",
    "architecture_of",
    "class_of",
    "config_section",
    "find_stacks",
    "flag_of",
    "is_embedding",
    "is_head",
    "is_input_side",
    "layer_counts",
    "main_stack",
    "says_tied",
]
