"""Runs a causal language model one decoder layer at a time, in float32.

Routers, statistics and perplexity share it.

empty.py    a model whose parameters have shapes and no memory; the whole model, if layers do not suffice
weights.py  its parameters, from pieces of stored tensors: by layer, by expert, by rows
runner.py   LayerRunner: the model's own forward, stopped at one layer
trial.py    whether that is allowed, found by layers that compute nothing
opening.py  open_runner: a checkpoint's runner, or why there is none
hidden.py   hidden states between two layers, in memory or in a file
"""

from merge.layerwise.empty import empty_model, whole_model
from merge.layerwise.hidden import HiddenStates
from merge.layerwise.opening import open_runner
from merge.layerwise.runner import LayerRunner
from merge.layerwise.trial import Unstreamable
from merge.layerwise.weights import LayerWeights

__all__ = ["HiddenStates", "LayerRunner", "LayerWeights", "Unstreamable", "empty_model", "open_runner", "whole_model"]
