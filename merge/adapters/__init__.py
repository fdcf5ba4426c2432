"""Adapters of PEFT and of this package: read, located in their base, turned into sources.

files.py    open_adapter: config and headers, checked
config.py   adapter_config.json: what is understood, scaling by module
parts.py    what an adapter consists of
tensors.py  tensors of the file -> parts
places.py   parts -> tensors of the base
changes.py  parts -> derived tensors
fold.py     open_model: a checkpoint, with its adapter folded in
inputs.py   adapters as inputs of a recipe
"""
