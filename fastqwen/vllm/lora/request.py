"""Part of vLLM's module layout: what a script with adapters is told."""

from __future__ import annotations

from typing import Any

from fastqwen.errors import BadRequest


class LoRARequest:
    """Raises BadRequest, so that a script learns at once what it cannot have."""

    def __init__(self, *given: Any, **named: Any) -> None:
        raise BadRequest(
            "there are no adapters (LoRA) here: merge one into the weights and load the result", "lora_request"
        )
