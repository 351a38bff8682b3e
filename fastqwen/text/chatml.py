"""Qwen-1's way from messages to ids: each piece of ChatML is encoded by itself, so that text never becomes control."""

from __future__ import annotations

from typing import Any

from fastqwen.errors import BadRequest
from fastqwen.text.content import text_of
from fastqwen.text.template import Message
from fastqwen.text.tokenizer import Tokenizer

DEFAULT_SYSTEM = "You are a helpful assistant."
ROLES = ("system", "user", "assistant", "tool", "function")


class PiecewiseChatMl:
    """``<|im_start|>role\\ncontent<|im_end|>`` pieces joined by newlines, a default system message in front."""

    origin = "built-in ChatML of Qwen-1"
    source = ""

    def encode(
        self,
        tokenizer: Tokenizer,
        messages: list[Message],
        *,
        tools: list[dict[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        **options: Any,
    ) -> list[int]:
        if tools:
            raise BadRequest("this model has no tool format of its own", "tools")
        start, end = (tokenizer.control_tokens[token] for token in ("<|im_start|>", "<|im_end|>"))
        newline = tokenizer.encode_plain("\n")
        if not messages or messages[0]["role"] != "system":
            messages = [{"role": "system", "content": DEFAULT_SYSTEM}, *messages]
        ids: list[int] = []
        for message in messages:
            if message["role"] not in ROLES:
                raise BadRequest(f"unknown role {message['role']!r}; known: {', '.join(ROLES)}", "messages")
            if ids:
                ids += newline
            ids += [start, *tokenizer.encode_plain(message["role"]), *newline]
            ids += [*tokenizer.encode_plain(text_of(message["content"])), end]
        if continue_final_message:
            ids.pop()
        elif add_generation_prompt:
            ids += [*newline, start, *tokenizer.encode_plain("assistant"), *newline]
        return ids
