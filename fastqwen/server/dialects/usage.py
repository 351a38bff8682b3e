"""Token counts in OpenAI's shape."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fastqwen.server.answer.generation import Generation


def usage_of(generations: Sequence[Generation]) -> dict[str, Any]:
    prompt = sum(len(one.prompt_token_ids) for one in generations)
    generated = sum(one.num_generated_tokens for one in generations)
    thought = [one.num_thinking_tokens for one in generations if one.parses_thinking]
    details = {"completion_tokens_details": {"reasoning_tokens": sum(thought)}} if thought else {}
    return {
        "prompt_tokens": prompt,
        "completion_tokens": generated,
        "total_tokens": prompt + generated,
        "prompt_tokens_details": {"cached_tokens": sum(one.num_cached_tokens for one in generations)},
        **details,
    }
