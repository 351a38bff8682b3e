"""Part of vLLM's module layout: the names that its scripts import from here."""

from fastqwen.vllm.async_llm import AsyncLLM

__all__ = ["AsyncLLM"]
