"""From recipe and headers to the steps of a plan. merge/jobs puts a plan together of this.

load.py     text -> Recipe or Pipeline; resolve.py locates the models, kind.py tells adapters from models
models.py   opens what a recipe names; inputs.py gives each model's tensors their common names
targets.py  the output's tensors, each with the tensors it is made from; steps.py gives them method and numbers
"""
