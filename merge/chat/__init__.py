"""Chat templates: the formats with names, and rendering within limits.

named.py   formats by name, the most common one of several
render.py  renders templates in a process of its own
worker.py  that process
"""
