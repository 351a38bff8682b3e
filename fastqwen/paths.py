"""Where fastqwen keeps what it can make or fetch again, and what it remembers."""

from __future__ import annotations

import os
from pathlib import Path

from fastqwen.errors import BadConfig


def cache_dir() -> Path:
    """$FASTQWEN_CACHE, or fastqwen/ in the user's cache folder. Made if it is not there; raises BadConfig where it cannot be."""
    return _folder("FASTQWEN_CACHE", "XDG_CACHE_HOME", ".cache")


def state_dir() -> Path:
    """$FASTQWEN_STATE, or fastqwen/ in the user's folder for what programs remember. Made if it is not there."""
    return _folder("FASTQWEN_STATE", "XDG_STATE_HOME", ".local/state")


def _folder(own_variable: str, users_variable: str, usual: str) -> Path:
    own = os.environ.get(own_variable)
    folder = Path(own) if own else Path(os.environ.get(users_variable) or Path.home() / usual) / "fastqwen"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise BadConfig(
            f"{folder} cannot be made ({error.strerror}): set {own_variable} to a folder that can be written"
        ) from None
    return folder
