"""Recipes of several documents: planned together (plan.py), carried out in turn (run.py)."""
