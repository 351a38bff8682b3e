"""Part of vLLM's module layout: the names that its scripts import from here."""

from fastqwen.outputs import Logprob

__all__ = ["Logprob"]
