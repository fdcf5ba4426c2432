"""Writes merge/architecture/table.json: facts from the installed transformers on language models and classifiers.

    python benchmarks/architecture_table.py              # all, some minutes
    python benchmarks/architecture_table.py LlamaForCausalLM GPT2LMHeadModel --check   # compare, write nothing

A class that cannot be built here (a missing package, a default config of which nothing can be built) is left out:
transformers is then asked with the model's own config when a model of that class is merged.
"""

from __future__ import annotations

import argparse
import sys
import time

from merge.architecture.ask import ask
from merge.architecture.facts import Architecture
from merge.architecture.table import TABLE, from_table, table_text

# What a model is loaded as if its config names no class, best first.
_BY_TYPE = (
    "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES",
    "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES",
    "MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES",
    "MODEL_FOR_PRETRAINING_MAPPING_NAMES",
    "MODEL_MAPPING_NAMES",
)


# The auto classes whose models are in the table, with the bodies of those of the first group.
_TEXT = ("CAUSAL_LM", "SEQ_TO_SEQ_CAUSAL_LM", "IMAGE_TEXT_TO_TEXT", "MASKED_LM", "PRETRAINING", "TEXT_ENCODING")
_OTHERS = (
    *("SEQUENCE_CLASSIFICATION", "TOKEN_CLASSIFICATION", "QUESTION_ANSWERING", "MULTIPLE_CHOICE"),
    *("NEXT_SENTENCE_PREDICTION", "SPEECH_SEQ_2_SEQ", "IMAGE_CLASSIFICATION", "ZERO_SHOT_IMAGE_CLASSIFICATION"),
)


def listed() -> list[str]:
    from transformers.models.auto import modeling_auto

    found: dict[str, None] = {}
    kinds: dict[str, None] = {}
    for name in (*_TEXT, *_OTHERS):
        for kind, classes in getattr(modeling_auto, f"MODEL_FOR_{name}_MAPPING_NAMES").items():
            found |= dict.fromkeys([classes] if isinstance(classes, str) else classes)
            kinds |= {kind: None} if name in _TEXT else {}
    for kind, classes in modeling_auto.MODEL_MAPPING_NAMES.items():
        if kind in kinds:
            found |= dict.fromkeys([classes] if isinstance(classes, str) else classes)
    return sorted(found)


def by_type(known: set[str]) -> dict[str, str]:
    from transformers.models.auto import modeling_auto

    found: dict[str, str] = {}
    for name in _BY_TYPE:
        for kind, classes in getattr(modeling_auto, name).items():
            first = classes if isinstance(classes, str) else classes[0]
            if first in known:
                found.setdefault(kind, first)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("classes", nargs="*", help="all by default")
    parser.add_argument("--check", action="store_true", help="compare with the table; exit code 1 if it differs")
    options = parser.parse_args()
    found: list[Architecture] = []
    failed: dict[str, str] = {}
    began = time.time()
    for name in options.classes or listed():
        try:
            found.append(ask(name))
        except Exception as error:
            failed[name] = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
    for name, reason in failed.items():
        print(f"{name}: left out: {reason:.100}", file=sys.stderr)
    print(f"{len(found)} classes in {time.time() - began:.0f} s, {len(failed)} left out", file=sys.stderr)
    if options.check:
        different = [each.name for each in found if from_table(each.name) != each]
        print("\n".join(different))
        sys.exit(bool(different))
    from transformers import __version__

    text = table_text(found, by_type({each.name for each in found}), __version__)
    TABLE.write_text(text, encoding="utf-8")
    print(f"{TABLE}: {len(text):,} bytes")


if __name__ == "__main__":
    main()
