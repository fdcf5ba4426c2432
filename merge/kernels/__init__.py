"""Compiled kernels. Whoever imports one of them imports numba."""

from merge import address_space

address_space.check()
