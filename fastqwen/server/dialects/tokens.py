"""POST /tokenize and /detokenize"""

from __future__ import annotations

from typing import Any

from fastqwen.errors import BadRequest
from fastqwen.server.answer.state import ServerState
from fastqwen.server.dialects.schema import DetokenizeRequest, TokenizeRequest


async def tokenize(state: ServerState, body: TokenizeRequest) -> dict[str, Any]:
    state.model_name(body.model)
    if (body.prompt is None) == (body.messages is None):
        raise BadRequest("give either prompt or messages", "prompt")
    for name in ("tools", "chat_template_kwargs"):
        if body.prompt is not None and getattr(body, name):
            raise BadRequest(f"{name} belongs to messages and has no effect on a prompt", name)
    if body.messages is not None:
        options = dict(body.chat_template_kwargs or {})
        if body.tools:
            options["tools"] = [tool.for_template() for tool in body.tools]
        messages = [message.for_template() for message in body.messages]
        tokens = await state.apply_template(messages, options, add_generation_prompt=body.add_generation_prompt)
    else:
        tokens = await state.tokenize(body.prompt or "", add_special_tokens=body.add_special_tokens)
    return {"count": len(tokens), "max_model_len": state.facts().max_model_len, "tokens": tokens}


async def detokenize(state: ServerState, body: DetokenizeRequest) -> dict[str, Any]:
    state.model_name(body.model)
    return {"prompt": state.text.tokenizer.decode(body.tokens)}
