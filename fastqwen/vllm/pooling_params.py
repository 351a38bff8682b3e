"""Part of vLLM's module layout: the names that its scripts import from here."""

from fastqwen.records import PoolingParams

__all__ = ["PoolingParams"]
