"""Part of vLLM's module layout: the names that its scripts import from here."""

from fastqwen.vllm.llm_engine import LLMEngine

__all__ = ["LLMEngine"]
