"""fastqwen serves Qwen models from 2023 on, on a CPU or a GPU.

The public names load on first use, so that ``fastqwen --help`` and the planner never pay for importing torch.
"""

from __future__ import annotations

import importlib
import os
from typing import TYPE_CHECKING, Any

from fastqwen.collections_paused import collections_paused
from fastqwen.version import __version__

# After each of torch's own operations its threads would look for the next one for milliseconds, on the cores that the CPU
# kernels' threads need: 8 streams were half as fast. OpenMP reads this when torch is imported, also in processes started later.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

if TYPE_CHECKING:
    from fastqwen.chat_model import ChatModel
    from fastqwen.llm import LLM
    from fastqwen.outputs import CompletionOutput, EmbeddingOutput, EmbeddingRequestOutput, Logprob, RequestOutput
    from fastqwen.records import SamplingParams

__all__ = [
    "LLM",
    "ChatModel",
    "CompletionOutput",
    "EmbeddingOutput",
    "EmbeddingRequestOutput",
    "Logprob",
    "RequestOutput",
    "SamplingParams",
    "__version__",
]

_HOME = {"LLM": "fastqwen.llm", "ChatModel": "fastqwen.chat_model", "SamplingParams": "fastqwen.records"}


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'fastqwen' has no attribute {name!r}")
    with collections_paused():
        home = importlib.import_module(_HOME.get(name, "fastqwen.outputs"))
    return getattr(home, name)
