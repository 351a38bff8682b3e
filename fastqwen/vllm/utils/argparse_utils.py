"""Part of vLLM's module layout: the names that its scripts import from here."""

from fastqwen.vllm.arguments import FlexibleArgumentParser

__all__ = ["FlexibleArgumentParser"]
