"""Part of vLLM's module layout: the names that its scripts import from here."""

from fastqwen.outputs import Counter, Gauge, Histogram, Metric, Vector

__all__ = ["Counter", "Gauge", "Histogram", "Metric", "Vector"]
