"""vLLM's module layout: a script's ``from vllm import LLM, SamplingParams`` becomes ``from fastqwen.vllm import ...``.

Each name is fastqwen's own class where both mean the same; the modules beneath hold what only vLLM's scripts know. As in
fastqwen itself, names load on first use.
"""

from __future__ import annotations

import importlib
from typing import Any

from fastqwen.version import __version__

_HOME = {
    "fastqwen.llm": ("LLM",),
    "fastqwen.outputs": (
        "BeamSearchOutput", "BeamSearchSequence", "ClassificationOutput", "ClassificationRequestOutput",
        "CompletionOutput", "EmbeddingOutput", "EmbeddingRequestOutput", "PoolingOutput", "PoolingRequestOutput",
        "RequestOutput", "ScoringOutput", "ScoringRequestOutput",
    ),
    "fastqwen.records": ("PoolingParams",),
    "fastqwen.vllm.arguments": ("AsyncEngineArgs", "EngineArgs"),
    "fastqwen.vllm.async_llm": ("AsyncLLM", "AsyncLLMEngine"),
    "fastqwen.vllm.llm_engine": ("LLMEngine",),
    "fastqwen.vllm.inputs": ("PromptType", "TextPrompt", "TokensPrompt"),
    "fastqwen.vllm.sampling_params": ("BeamSearchParams", "RequestOutputKind", "SamplingParams", "StructuredOutputsParams"),
}  # fmt: skip
_MODULES = {name: module for module, names in _HOME.items() for name in names}

__all__ = ["__version__", *_MODULES]  # noqa: PLE0604 all are names


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(
            f"fastqwen.vllm has no {name!r}; docs/from_vllm.md says what of vLLM there is, and what to use for the rest"
        )
    return getattr(importlib.import_module(_MODULES[name]), name)
