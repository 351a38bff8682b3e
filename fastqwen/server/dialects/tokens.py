"""POST /tokenize and /detokenize"""

from __future__ import annotations

from typing import Any

from fastqwen.errors import BadRequest
from fastqwen.server.answer.state import ServerState
from fastqwen.server.dialects.conversation import for_template, rendered
from fastqwen.server.dialects.openai import noted
from fastqwen.server.dialects.schema import DetokenizeRequest, TokenizeRequest
from fastqwen.server.dialects.tools import function_tools


async def tokenize(state: ServerState, body: TokenizeRequest) -> dict[str, Any]:
    state.model_name(body.model)
    if (body.prompt is None) == (body.messages is None):
        raise BadRequest("give either prompt or messages", "prompt")
    for name in ("tools", "chat_template_kwargs"):
        if body.prompt is not None and getattr(body, name):
            raise BadRequest(f"{name} belongs to messages and has no effect on a prompt", name)
    if body.messages is not None:
        options = dict(body.chat_template_kwargs or {})
        tools = function_tools(body.tools, body.warnings)
        if tools:
            options["tools"] = tools
        tokens = await rendered(
            state,
            for_template(body.messages, state.formats, body.warnings),
            options,
            body.warnings,
            add_generation_prompt=body.add_generation_prompt,
            continue_final_message=body.continue_final_message,
        )
    else:
        tokens = await state.tokenize(body.prompt or "", add_special_tokens=body.add_special_tokens)
    found = {"count": len(tokens), "max_model_len": state.facts().max_model_len, "tokens": tokens}
    return {**found, **noted(state, body.warnings)}


async def detokenize(state: ServerState, body: DetokenizeRequest) -> dict[str, Any]:
    state.model_name(body.model)
    return {"prompt": state.text.tokenizer.decode(body.tokens), **noted(state, body.warnings)}
