"""YAML to values by tables of keys, for recipes and configs: strict, and all problems are reported together.

document.py  YAML text -> one tree of nodes with lines; size, depth, aliases, tags
keys.py      one key: what its value may be, and its line of help
reader.py    nodes -> values by a table of keys; collects problems
scalars.py   nodes -> numbers and booleans, and how messages name them
names.py     the nearest of the known names
"""
