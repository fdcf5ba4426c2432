"""Which tensors an output has: slices, modules, depth up-scaling."""
