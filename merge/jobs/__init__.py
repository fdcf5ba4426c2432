"""What a recipe can ask for beyond merging tensor by tensor: a file or folder each. build.py chooses.

stacks/      slices of layers, depth up-scaling, modules (towers)
mixtures/    mixtures of experts: layouts, routers
alignment/   permutation of units
vocabulary/  the output's tokenizer and rows
pipelines/   recipes of several documents
adapters.py  recipes whose inputs, and output, are adapters
"""
