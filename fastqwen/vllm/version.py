"""Part of vLLM's module layout: the names that its scripts import from here."""

from fastqwen.version import __version__

__all__ = ["__version__"]
