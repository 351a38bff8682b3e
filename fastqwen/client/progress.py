"""What a batch's caller sees of it while it runs, and what no batch has."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

from tqdm import tqdm

from fastqwen.errors import BadRequest

BAR_FROM_PROMPTS = 2


def refuse_lora(lora_request: Any) -> None:
    if lora_request is not None:
        raise BadRequest(
            "there are no adapters (LoRA) here: merge one into the weights and load the result", "lora_request"
        )


def bar(num_prompts: int, wanted: bool | Callable[..., Any]) -> tqdm[Any]:
    off = not wanted or num_prompts < BAR_FROM_PROMPTS
    make = wanted if callable(wanted) else tqdm
    return cast("tqdm[Any]", make(total=num_prompts, unit="prompt", disable=off, dynamic_ncols=True))
