"""Where fastqwen keeps what it can make or fetch again, and what it remembers."""

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


def state_dir() -> Path:
    """$FASTQWEN_STATE, or fastqwen/ in the user's folder for what programs remember. Made if it is not there."""
    base = os.environ.get("FASTQWEN_STATE")
    folder = Path(base) if base else Path(os.environ.get("XDG_STATE_HOME") or Path.home() / ".local/state") / "fastqwen"
    folder.mkdir(parents=True, exist_ok=True)
    return folder
