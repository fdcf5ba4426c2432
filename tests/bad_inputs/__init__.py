"""Everything that people, disks and downloads get wrong, as data: what was tried, the exit code, words of the message.

    room.py       Case, Room (a folder with small models in it) and try_out, which runs the command line on a case
    weights.py    damaged, hostile and foreign weight files and model directories
    models.py     models that do not fit each other, or hold numbers that do not
    recipes.py    recipes that are wrong by themselves
    machine.py    outputs, disks, options, and sources that change
    outputs.py    merge verify on what is no longer as it was written

tests/test_bad_inputs.py runs them all; benchmarks/bad_inputs.py prints them as a table. To add a case is to add a
function to one of these files.
"""

from bad_inputs import machine, models, outputs, recipes, weights
from bad_inputs.room import CASES, Case, Outcome, Room, try_out

__all__ = ["CASES", "Case", "Outcome", "Room", "machine", "models", "outputs", "recipes", "try_out", "weights"]
