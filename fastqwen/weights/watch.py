"""Files that are mapped while a model is served: whoever writes into one changes the model under its users."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

from fastqwen.errors import BadCheckpoint


class MappedFiles:
    """Made before the files are mapped. One that is deleted, or replaced by another under its name, stays mapped as it was."""

    def __init__(self, paths: Iterable[Path]) -> None:
        """What does not exist, such as the files of weights that are made up, is not watched."""
        self._files = {path: os.open(path, os.O_RDONLY | os.O_CLOEXEC) for path in sorted(set(paths)) if path.is_file()}
        self._states = {path: _state(file) for path, file in self._files.items()}

    def check(self) -> None:
        """Raises BadCheckpoint, naming the file. Costs a microsecond for each."""
        for path, file in self._files.items():
            if _state(file) != self._states[path]:
                raise BadCheckpoint(f"{path} was changed while it was in use: start again once it is whole")


def _state(file: int) -> tuple[int, int]:
    found = os.fstat(file)
    return found.st_size, found.st_mtime_ns
