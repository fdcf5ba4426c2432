"""Results that a run needs before its first step: alignments, router rows, thresholds.

One file a kind, with its class (FINDING) and the module that finds it (FINDER). Plans hold findings, and tensors whose
numbers are found (merge.sources.found). The engine imports a finder when it is needed, so this room knows none.
"""
