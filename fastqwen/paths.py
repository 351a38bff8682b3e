"""Where fastqwen keeps what it can make or fetch again."""

from __future__ import annotations

import os
from pathlib import Path


def cache_dir() -> Path:
    """$FASTQWEN_CACHE, or fastqwen/ in the user's cache folder. Made if it is not there."""
    base = os.environ.get("FASTQWEN_CACHE")
    if base:
        folder = Path(base)
    else:
        folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fastqwen"
    folder.mkdir(parents=True, exist_ok=True)
    return folder
