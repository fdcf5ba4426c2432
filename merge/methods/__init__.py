"""One file, one method. Adding a method is adding a file."""

from merge.methods.registry import Method, Parameter, PerModel, Range, all_methods, get_method, method

__all__ = ["Method", "Parameter", "PerModel", "Range", "all_methods", "get_method", "method"]
