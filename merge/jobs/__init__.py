"""Planners for everything beyond merging tensor by tensor, each in its own file or folder; build.py chooses.

stacks/      slices of layers, depth up-scaling, modules (towers)
mixtures/    mixtures of experts: layouts, routers
alignment/   permutation of units
vocabulary/  the output's tokenizer and rows
pipelines/   recipes of several documents
adapters.py  recipes whose inputs, and output, are adapters
"""
