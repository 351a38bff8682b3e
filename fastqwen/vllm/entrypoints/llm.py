"""Part of vLLM's module layout: the names that its scripts import from here."""

from fastqwen.llm import LLM

__all__ = ["LLM"]
