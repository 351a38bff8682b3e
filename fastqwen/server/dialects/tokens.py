"""POST /tokenize and /detokenize, GET /tokenizer_info"""

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
    for name in ("tools", "chat_template_kwargs", "chat_template"):
        if body.prompt is not None and getattr(body, name):
            raise BadRequest(f"{name} belongs to messages and has no effect on a prompt", name)
    if body.messages is not None:
        options = {**(state.config.default_chat_template_kwargs or {}), **(body.chat_template_kwargs or {})}
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
            template=body.chat_template,
        )
    else:
        tokens = await state.tokenize(body.prompt or "", add_special_tokens=body.add_special_tokens)
    found: dict[str, Any] = {
        "count": len(tokens),
        "max_model_len": state.facts().max_model_len,
        "tokens": tokens,
        "token_strs": [state.text.tokenizer.vocabulary_entry(one) for one in tokens]
        if body.return_token_strs
        else None,
    }
    return {**found, **noted(state, body.warnings)}


async def detokenize(state: ServerState, body: DetokenizeRequest) -> dict[str, Any]:
    state.model_name(body.model)
    return {"prompt": state.text.tokenizer.decode(body.tokens), **noted(state, body.warnings)}


def tokenizer_info(state: ServerState) -> dict[str, Any]:
    """What a client must know to make prompts of its own, under the names of tokenizer_config.json."""
    text = state.text
    control = text.tokenizer.control_tokens
    ends = text.stop_token_ids
    return {
        "tokenizer_class": type(text.tokenizer).__name__,
        "vocab_size": text.tokenizer.vocab_size,
        "model_max_length": state.facts().max_model_len,
        "chat_template": None if text.template is None else text.template.source,
        "eos_token": text.tokenizer.token_text(ends[0]) if ends else None,
        "additional_special_tokens": list(control),
        "added_tokens_decoder": {str(number): {"content": token, "special": True} for token, number in control.items()},
    }
