"""Compiled inner loops. Importing any of them imports numba."""

from merge import address_space

address_space.check()
