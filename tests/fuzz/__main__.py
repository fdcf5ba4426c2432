"""One case again, with its files left in place: `python -m fuzz FORMAT SEED [FOLDER]`."""

from __future__ import annotations

import os
import random
import sys
import tempfile
from pathlib import Path


def main() -> None:
    name, seed = sys.argv[1], int(sys.argv[2])
    folder = Path(sys.argv[3] if len(sys.argv) > 3 else tempfile.mkdtemp()).resolve()
    folder.mkdir(parents=True, exist_ok=True)
    os.environ.update(HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1", TOKENIZERS_PARALLELISM="false")
    sys.path[:] = [os.path.abspath(place) for place in sys.path]
    os.chdir(folder)
    from fuzz.judge import limit_memory, prepare, try_case

    format_, place = prepare(name, folder)
    limit_memory()
    verdict = try_case(name, format_, place, seed, reset=False)
    place.reset()
    work = format_.damage(place, random.Random(f"{name}:{seed}"))
    print(f"cd {folder}\n{'merge ' + ' '.join(work) if isinstance(work, list) else work}\n{verdict}")


if __name__ == "__main__":
    main()
