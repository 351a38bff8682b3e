"""Part of vLLM's module layout: the names that its scripts import from here."""

from fastqwen.vllm.entrypoints.chat_utils import load_chat_template

__all__ = ["load_chat_template"]
