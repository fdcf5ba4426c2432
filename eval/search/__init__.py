"""Looks for the recipe that scores best: a recipe with open places, tuned by Optuna. Start with run.py.

places.py       one open place; space.py: all of a recipe, and the plain recipes that their values make (located.py)
baselines.py    what a search has to beat
judges.py       who scores candidates: tasks, or a function; live.py: one model in memory, with each candidate's weights
divergence.py   the distance from a model on a text as an objective
sweep.py        curves and maps over one or two parameters
objective.py    from scores to what is maximised; stopping.py: a test that stops bad candidates early
genome.py, asked.py   recipes and objectives as commands get them
outputs.py, report.py, page.py, scatter.py   what people see of it
study.py        the trials, in a file that is resumed and shared; record.py: the rows of a search
"""
