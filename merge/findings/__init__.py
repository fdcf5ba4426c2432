"""Results that a run needs before its first step: alignments, router rows, thresholds.

Each kind has a file with its class (FINDING) and the name of the module that computes it (FINDER). Plans hold findings,
and tensors whose numbers come from them (merge.sources.found). The engine imports a finder when it needs it; nothing in
this package does.
"""
