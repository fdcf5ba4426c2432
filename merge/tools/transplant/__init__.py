"""Gives a model another model's tokenizer (`merge transplant`): plan.py, rows.py, omp.py."""

from __future__ import annotations

# Ways to make the rows of new tokens, and what such a row is.
METHODS = {
    "omp": "the combination of shared tokens' rows that gives the token's row in DONOR's embeddings (and head)",
    "mean": "the mean of the pieces into which MODEL's tokenizer cuts the token's text",
    "zero": "zeros",
    "copy-only": "the mean of all copied rows",
}
