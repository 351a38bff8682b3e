"""POST /v1/chat/completions/batch: several conversations, each with one answer, as the choices of one response."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field

from fastqwen.errors import BadRequest
from fastqwen.server.answer.merge import gather
from fastqwen.server.answer.state import ServerState
from fastqwen.server.dialects.chat import Chat
from fastqwen.server.dialects.openai import WITHOUT_MEANING, noted
from fastqwen.server.dialects.schema import ChatFields, ChatMessage, ChatRequest

MAX_CONVERSATIONS = 1024
# What one response of several conversations has no place for: the values that are taken, and what to do instead.
ELSEWHERE: dict[str, tuple[tuple[Any, ...], str]] = {
    "stream": ((False,), "send the conversations one by one to stream their answers"),
    "n": ((None, 1), "give a conversation as often as it shall have answers"),
    "tools": ((None, []), "send conversations with tools one by one"),
    "tool_choice": ((None, "none", "auto"), "send conversations with tools one by one"),
    "parallel_tool_calls": ((None,), "send conversations with tools one by one"),
    "use_beam_search": ((False,), "send the conversations one by one"),
    "length_penalty": ((1.0,), "send the conversations one by one"),
    "prompt_logprobs": ((None,), "send the conversations one by one"),
    "return_prompt_text": ((False,), "send the conversations one by one"),
}


class ChatBatchRequest(ChatFields):
    messages: Annotated[
        list[Annotated[list[ChatMessage], Field(min_length=1)]], Field(min_length=1, max_length=MAX_CONVERSATIONS)
    ]


async def chat_batch(state: ServerState, body: ChatBatchRequest) -> dict[str, Any]:
    """Nothing runs before all of them were checked. Raises BadRequest."""
    for name, (taken, advice) in ELSEWHERE.items():
        if getattr(body, name) not in taken:
            raise BadRequest(f"{name} cannot be had for several conversations at once: {advice}", name)
    shared = {name: getattr(body, name) for name in body.model_fields_set & ChatFields.model_fields.keys()}
    works = [
        Chat(state, ChatRequest.of(body.warnings, messages=messages, **shared), explain_cache=False)
        for messages in body.messages
    ]
    for index, work in enumerate(works):
        try:
            await work.prepare()
        except BadRequest as error:
            raise BadRequest(f"conversation {index}: {error}", error.param, error.code) from None
    await gather([work.generation.finish() for work in works])
    choices = []
    for index, work in enumerate(works):
        prompt = {"prompt_token_ids": work.generation.prompt_token_ids} if body.return_token_ids else {}
        choices += await work.choices(index=index, **prompt)
    for work in works:
        work.notes()  # adds what the answers are warned of
        body.warnings.include(work.warnings)
    head = {**works[0].head("chat.completion"), **WITHOUT_MEANING}
    return {
        **head,
        "choices": choices,
        "usage": _sum_of([work.usage() for work in works]),
        **noted(state, body.warnings),
    }


def _sum_of(usages: list[dict[str, Any]]) -> dict[str, Any]:
    """Numbers, and dicts of them."""
    found: dict[str, Any] = {}
    for name, one in usages[0].items():
        listed = [usage[name] for usage in usages]
        found[name] = _sum_of(listed) if isinstance(one, dict) else sum(listed)
    return found
