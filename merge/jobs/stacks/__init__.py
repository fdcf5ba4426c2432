"""Arranges the tensors of an output: slices, modules, depth up-scaling."""
