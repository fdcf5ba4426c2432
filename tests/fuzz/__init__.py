"""Files damaged with their structure in mind: whatever they hold, `merge` ends soon, in little memory, with a message.

    damage.py        what all formats share: bytes, trees and values to damage them with
    place.py         the folder a case happens in, and how files get back to what they were
    judge.py         one case: run, measured, and held to its promises
    campaign.py      many cases, in processes of their own that are watched
    FORMAT.py        one file a format: how sound files look, and how a case damages them

A case is a format and a seed; the same seed makes the same files. To see one again, with its files left in place:

    cd tests && python -m fuzz pickles 1234

A format is a module with a class Format (place.py); it is found by being listed here.
"""

FORMATS = (
    *("safetensors", "indexes", "pickles", "configs", "adapters", "tokenizers", "recipes", "mixtures", "pipelines"),
    *("finetuning", "data", "evaluations", "outputs", "statistics", "ggufs", "quantised"),
)
