"""Merge methods, one file each. Adding a file adds a method."""

from merge.methods.registry import Method, Parameter, PerModel, Range, all_methods, get_method, known_method, method

__all__ = ["Method", "Parameter", "PerModel", "Range", "all_methods", "get_method", "known_method", "method"]
