"""Part of vLLM's module layout: its groups of options as objects, which ``LLM`` takes, or refuses with a reason, as it does flags.

What is not given says nothing.
"""

from __future__ import annotations

import json
from typing import Any


class _Options:
    """Fields under whatever names: ``fastqwen.vllm_names`` says of the whole what it means here."""

    def __init__(self, *given: Any, **fields: Any) -> None:
        if given:
            fields = {"mode": given[0], **fields} if len(given) == 1 else {"values": list(given), **fields}
        vars(self).update(fields)

    def __str__(self) -> str:
        return json.dumps({name: value for name, value in vars(self).items() if value is not None}, default=str)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(f'{name}={value!r}' for name, value in vars(self).items())})"


class AttentionConfig(_Options): ...


class CompilationConfig(_Options): ...


class KVTransferConfig(_Options): ...


class PoolerConfig(_Options): ...


class ProfilerConfig(_Options): ...


class ReasoningConfig(_Options): ...


class SpeculativeConfig(_Options): ...


class StructuredOutputsConfig(_Options): ...


class WeightTransferConfig(_Options): ...
