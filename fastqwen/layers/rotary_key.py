"""The name of a rotary profile, chosen from lengths alone: the scheduler and the prefix cache need it without torch."""

from __future__ import annotations

import math

from fastqwen.model_config import RopeConfig

DEFAULT_KEY = ""


def rope_key(rope: RopeConfig, num_prompt_tokens: int, max_tokens: int | None, *, per_request: bool = False) -> str:
    """Which profile a new request gets, for all its life.

    Qwen-1: alpha = max(1, 2^ceil(log2(L / trained_len) + 1) - 1) from the prompt's length L alone.
    YaRN with ``per_request``: unscaled while prompt and answer fit the trained length, else the smallest factor that
    covers both, but no more than the checkpoint's own. ``max_tokens`` of None, an answer of any length, counts nothing
    beside a prompt that fits; beside a longer one it asks for the whole factor. Otherwise there is one profile for all.
    """
    if rope.kind == "qwen1_ntk":
        return f"ntk:{ntk_alpha(num_prompt_tokens, rope.trained_len)}"
    if rope.kind == "yarn" and per_request:
        if max_tokens is None:
            factor = 1.0 if num_prompt_tokens <= rope.trained_len else rope.factor
        else:
            factor = max(1.0, min((num_prompt_tokens + max_tokens) / rope.trained_len, rope.factor))
        return f"yarn:{factor!r}"
    return DEFAULT_KEY


def ntk_alpha(num_prompt_tokens: int, trained_len: int) -> int:
    doublings = math.ceil(math.log2(num_prompt_tokens / trained_len) + 1)
    return max(1, int(2.0**doublings) - 1)


def parse_key(key: str) -> tuple[str, float]:
    kind, _, value = key.partition(":")
    return kind, float(value or 1.0)
