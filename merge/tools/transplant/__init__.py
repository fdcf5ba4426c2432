"""Gives a model another model's tokenizer (`merge transplant`): plan.py, rows.py, omp.py."""
