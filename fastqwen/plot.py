"""Files that ``--plot`` writes. matplotlib is an optional extra, imported only by who asks for a plot."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

from fastqwen.errors import BadConfig

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def check_plot(path: Path) -> None:
    """Raises BadConfig for what would otherwise come out only after the work that is to be drawn."""
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError:
        raise BadConfig("--plot needs matplotlib: pip install 'fastqwen[plot]'") from None
    if path.suffix.lower() not in (".png", ".svg", ".pdf"):
        raise BadConfig(f"--plot is {str(path)!r}, but must end in .png, .svg or .pdf")
    there = os.path.lexists(path)
    try:
        # Only opening it tells of every reason: no such folder, no right to write, a folder of that name, ...
        path.open("ab").close()
        if not there:
            path.unlink()
    except OSError as error:
        raise _cannot_write(path, error) from None


def save_plot(figure: Figure, path: Path, *, crop: bool = False) -> None:
    """``crop`` fits the picture to what was drawn; otherwise it has the figure's size. Raises BadConfig."""
    try:
        figure.savefig(path, dpi="figure", bbox_inches="tight" if crop else None)
    except OSError as error:
        raise _cannot_write(path, error) from None


def _cannot_write(path: Path, error: OSError) -> BadConfig:
    return BadConfig(f"--plot cannot write {path}: {error.strerror or error}")
