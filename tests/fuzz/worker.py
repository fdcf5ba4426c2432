"""A process that tries cases, a line of JSON for each: `python -m fuzz.worker pickles:1:500 recipes:1:500`."""

from __future__ import annotations

import dataclasses
import json
import os
import sys
import tempfile
from pathlib import Path


def main() -> None:
    os.environ.update(HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1", TOKENIZERS_PARALLELISM="false", COLUMNS="200")
    from fuzz.judge import limit_memory, prepare, try_case

    memory_disk = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None  # each run waits for the disk some ten times
    with tempfile.TemporaryDirectory(dir=memory_disk) as folder:
        for number, part in enumerate(sys.argv[1:]):
            name, first, last = part.split(":")
            path = Path(folder, str(number))
            path.mkdir()
            os.chdir(path)
            format_, place = prepare(name, path)
            limit_memory()
            for seed in range(int(first), int(last) + 1):
                _say({"format": name, "seed": seed})
                _say({"format": name, "seed": seed, **dataclasses.asdict(try_case(name, format_, place, seed))})


def _say(line: dict[str, object]) -> None:
    print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
