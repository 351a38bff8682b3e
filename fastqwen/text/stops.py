"""Which tokens end an answer, derived from what the checkpoint says; each with where it came from."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import msgspec

from fastqwen.errors import FastqwenError
from fastqwen.text.belonging import CONVERSATION, PROBE
from fastqwen.text.chatml import PiecewiseChatMl
from fastqwen.text.template import ChatTemplate
from fastqwen.text.tokenizer import Tokenizer


class StopToken(msgspec.Struct, frozen=True):
    token_id: int
    text: str
    origin: str


def derive_stops(
    tokenizer: Tokenizer,
    *,
    template: ChatTemplate | PiecewiseChatMl | None,
    config_eos: Iterable[int] = (),
    config_origin: str = "config.json: eos_token_id",
    generation_config: dict[str, Any] | None = None,
    chosen: dict[str, dict[str, Any]] | None = None,
    tokenizer_eos: str | int | None = None,
    further: Iterable[int] = (),
) -> list[StopToken]:
    """Every id once, with the first origin that names it. Ids outside the vocabulary are left out.

    ``chosen``: a generation_config.json of the operator's, by its path; what it adds holds for every request.
    """
    generation = generation_config or {}
    eos = tokenizer.token_id(tokenizer_eos) if isinstance(tokenizer_eos, str) else tokenizer_eos
    named: list[tuple[Any, str]] = [
        *((values.get("eos_token_id"), f"{file}: eos_token_id") for file, values in (chosen or {}).items()),
        (generation.get("eos_token_id"), "generation_config.json: eos_token_id"),
        (list(config_eos), config_origin),
        (eos, "tokenizer: eos_token" if isinstance(tokenizer_eos, str) else "tokenizer: eos_token_id"),
    ]
    if generation.get("chat_format") == "chatml":
        ends = [tokenizer.token_id(token) for token in ("<|im_end|>", "<|im_start|>")]
        named.append((ends, "generation_config.json: chat_format chatml"))
    if template is not None:
        named.append((_end_of_turn(tokenizer, template), f"{template.origin}: ends an assistant's turn"))
    named.append((list(further), "the vocabulary: ends an answer in every program that reads GGUF"))
    found: dict[int, str] = {}
    for ids, origin in named:
        for token_id in ids if isinstance(ids, (list, tuple)) else [ids]:
            if isinstance(token_id, int) and 0 <= token_id < tokenizer.vocab_size:
                found.setdefault(token_id, origin)
    return [StopToken(token_id, tokenizer.token_text(token_id), origin) for token_id, origin in found.items()]


PROBE_TOKENS = 32  # more than the probe can be


def _end_of_turn(tokenizer: Tokenizer, template: ChatTemplate | PiecewiseChatMl) -> int | None:
    """The first control token that the template writes after an assistant's answer."""
    try:
        ids = template.encode(tokenizer, CONVERSATION, add_generation_prompt=False)
    except FastqwenError:
        return None  # a template that wants other messages: the other sources must do
    control = set(tokenizer.control_tokens.values())
    for length in range(1, len(ids)):
        if tokenizer.decode(ids[max(0, length - PROBE_TOKENS) : length]).rstrip().endswith(PROBE):
            return next((token_id for token_id in ids[length:] if token_id in control), None)
    return None
