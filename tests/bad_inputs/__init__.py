"""Everything that people, disks and downloads get wrong, as data: what was tried, the exit code, words of the message.

    weights   damaged, hostile and foreign weight files and model directories
    models    models that do not fit each other, or hold numbers that do not
    recipes   recipes that are wrong by themselves
    machine   outputs, disks, options, and sources that change
    outputs   merge verify on what is no longer as it was written

The cases are the entries of NAME.yaml: a recipe or a command beside two good models; what takes more is made by the
function of the entry's name in NAME.py. room.py has Case, Room (a folder with small models in it) and try_out, which
runs the command line on a case. tests/test_bad_inputs.py runs them all.
"""

from pathlib import Path

from bad_inputs import machine, models, outputs, recipes, weights
from bad_inputs.room import SET_UPS, Case, Outcome, Room, read_cases, try_out

CASES: dict[str, Case] = {}
for _part in (machine, models, outputs, recipes, weights):
    assert _part.__file__ is not None
    CASES |= read_cases(Path(_part.__file__).with_suffix(".yaml"))
assert set(SET_UPS) <= set(CASES), set(SET_UPS) - set(CASES)
assert len({case.what for case in CASES.values()}) == len(CASES)

__all__ = ["CASES", "Case", "Outcome", "Room", "try_out"]
