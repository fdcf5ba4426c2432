"""Text files that a command is given."""

from __future__ import annotations

from pathlib import Path

from merge.errors import UsageError


def read_text(path: Path, flag: str) -> str:
    """A UTF-8 text, without the mark that some editors put before it; UsageError, with the flag that named it."""
    try:
        return path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise UsageError(f"{flag} {path}: cannot be read ({error.strerror or error}).") from None
    except UnicodeDecodeError as error:
        raise UsageError(f"{flag} {path}: is not UTF-8 text ({error}).") from None
