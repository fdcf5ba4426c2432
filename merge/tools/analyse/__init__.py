"""Looks at models before they are merged (`merge analyse`): how alike they are, and what to try.

preflight.py   what the files alone say: tokenizers, templates, architecture, dtypes
elements.py    what is measured by element: norms, cosines, signs, trimming, rounding
spectra.py     what is measured by matrix: effective rank, energy, shared directions, interference
results.py     the analysis as frozen data, and its sums by role and layer
looks.py       what a delta looks like: LoRA, full, a few layers, embeddings only
checks.py      what the measures say against a merge: another base, duplicates, empty deltas
suggest.py     a method and its parameters, with reasons and sources
recipe.py      the suggestion as a recipe that runs
tables.py      rows for JSON and CSV, and the map of models
run.py         analyse(): all of it
"""

from merge.tools.analyse.results import Analysis
from merge.tools.analyse.run import analyse

__all__ = ["Analysis", "analyse"]
