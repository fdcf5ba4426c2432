"""Where this package keeps what it can make again: `$XDG_CACHE_HOME/merge-workbench`, or `~/.cache/merge-workbench`."""

from __future__ import annotations

import os
from pathlib import Path


def user_cache() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "merge-workbench"
