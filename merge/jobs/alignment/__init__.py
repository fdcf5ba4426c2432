"""Permutes the units of a model so that it is nearest to the reference: plan.py, find.py."""
