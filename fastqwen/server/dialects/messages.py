"""POST /v1/messages and /v1/messages/count_tokens: Anthropic's form of the same chat."""

from __future__ import annotations

import json
import uuid
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Annotated, Any, Literal

from pydantic import Field

from fastqwen.errors import BadRequest
from fastqwen.server.answer.generation import Choice, Generation, parts_of
from fastqwen.server.answer.state import ServerState
from fastqwen.server.dialects.chat import Chat
from fastqwen.server.dialects.schema import Body, ChatRequest, Count, Probability, Temperature, TopK
from fastqwen.server.http.sse import named_event
from fastqwen.text.answer import Parts
from fastqwen.text.tool_calls import Call

STOP_REASONS = {"stop": "end_turn", "length": "max_tokens", "tool_calls": "tool_use"}
MIN_THINKING_TOKENS = 1


class InputTool(Body):
    name: str
    description: str | None = None
    input_schema: dict[str, Any]
    type: Literal["custom"] | None = None
    cache_control: dict[str, Any] | None = None  # equal beginnings are always cached


class ToolChoice(Body):
    type: Literal["auto", "any", "tool", "none"]
    name: str | None = None
    disable_parallel_tool_use: bool = False


class Thinking(Body):
    type: Literal["enabled", "disabled", "adaptive"]
    budget_tokens: Annotated[int, Field(ge=MIN_THINKING_TOKENS, lt=2**31)] | None = None


class InputMessage(Body):
    role: Literal["user", "assistant"]
    content: str | list[dict[str, Any]]


class CountRequest(Body):
    """What decides about a prompt's length."""

    model: str | None = None
    messages: Annotated[list[InputMessage], Field(min_length=1)]
    system: str | list[dict[str, Any]] | None = None
    tools: list[InputTool] | None = None
    tool_choice: ToolChoice | None = None
    thinking: Thinking | None = None

    def chat_fields(self) -> dict[str, Any]:
        """The same in the words of ChatRequest. Raises BadRequest for content that cannot be had here."""
        fields: dict[str, Any] = {"model": self.model, "messages": self._messages(), **self._tool_fields()}
        if self.thinking is not None:
            fields["enable_thinking"] = self.thinking.type != "disabled"
            fields["thinking_budget"] = self.thinking.budget_tokens
        return fields

    def _messages(self) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = []
        if self.system is not None:
            text = self.system if isinstance(self.system, str) else _texts(self.system, "system")
            found.append({"role": "system", "content": text})
        for message in self.messages:
            found += [{"role": message.role, "content": message.content}] if isinstance(message.content, str) else (
                _assistant_turn(message.content) if message.role == "assistant" else _user_turn(message.content)
            )  # fmt: skip
        return found

    def _tool_fields(self) -> dict[str, Any]:
        fields: dict[str, Any] = {}
        if self.tools:
            fields["tools"] = [
                {"type": "function", "function": {"name": t.name, "description": t.description, "parameters": t.input_schema}}
                for t in self.tools
            ]  # fmt: skip
        choice = self.tool_choice
        if choice is not None:
            if choice.type == "tool":
                fields["tool_choice"] = {"type": "function", "function": {"name": choice.name or ""}}
            else:
                fields["tool_choice"] = {"any": "required"}.get(choice.type, choice.type)
            if choice.disable_parallel_tool_use:
                fields["parallel_tool_calls"] = False
        return fields


class MessagesRequest(CountRequest):
    max_tokens: Count
    stream: bool = False
    stop_sequences: list[str] | None = None
    temperature: Temperature | None = None
    top_p: Probability | None = None
    top_k: TopK | None = None
    metadata: dict[str, Any] | None = None
    service_tier: str | None = None

    def as_chat(self) -> ChatRequest:
        same = self.model_dump(include={"max_tokens", "temperature", "top_p", "top_k", "metadata", "service_tier"})
        return ChatRequest.of(**self.chat_fields(), **same, stop=self.stop_sequences)


class Messages:
    """One request. ``events`` streams it, ``response`` waits for the whole."""

    def __init__(self, state: ServerState, body: MessagesRequest, *, explain_cache: bool) -> None:
        self._chat = Chat(state, body.as_chat(), explain_cache=explain_cache)
        self._model = state.model_name(body.model)
        self._id = f"msg_{uuid.uuid4().hex}"

    async def prepare(self) -> None:
        await self._chat.prepare()

    def tokens(self) -> tuple[int, int]:
        return self._chat.tokens()

    async def response(self) -> dict[str, Any]:
        generation = self._chat.generation
        await generation.finish()
        choice = generation.choices[0]
        return {
            **self._head(_blocks(choice.answer)),
            **_ending(choice),
            "usage": _usage(generation),
            **self._chat.notes(),
        }

    async def events(self) -> AsyncGenerator[bytes, None]:
        generation = self._chat.generation
        start = {**self._head([]), "stop_reason": None, "stop_sequence": None, "usage": _usage(generation)}
        yield named_event("message_start", {"type": "message_start", "message": start})
        writer = _BlockWriter()
        async with aclosing(generation.pieces()) as pieces:
            async for _, piece in pieces:
                data = writer.write(parts_of(piece))
                if data:
                    yield data
        end = {"type": "message_delta", "delta": _ending(generation.choices[0]), "usage": _usage(generation)}
        yield writer.close() + named_event("message_delta", {**end, **self._chat.notes()})
        yield named_event("message_stop", {"type": "message_stop"})

    def _head(self, content: list[dict[str, Any]]) -> dict[str, Any]:
        return {"id": self._id, "type": "message", "role": "assistant", "model": self._model, "content": content}


async def count_tokens(state: ServerState, body: CountRequest) -> dict[str, int]:
    chat = Chat(state, ChatRequest.of(**body.chat_fields(), max_tokens=1))
    await chat.prepare()
    return {"input_tokens": len(chat.generation.prompt_token_ids)}


class _BlockWriter:
    """Content blocks as events: each begins, grows and ends before the next one begins."""

    def __init__(self) -> None:
        self._index = -1
        self._open: str | None = None

    def write(self, parts: Parts) -> bytes:
        data = b""
        if parts.reasoning:
            data += self._grow("thinking", {"thinking": ""}, {"type": "thinking_delta", "thinking": parts.reasoning})
        if parts.content:
            data += self._grow("text", {"text": ""}, {"type": "text_delta", "text": parts.content})
        for call in parts.calls:
            data += self.close()
            block = _tool_use(call)
            delta = {"type": "input_json_delta", "partial_json": call.arguments}
            data += self._grow("tool_use", {**block, "input": {}}, delta) + self.close()
        return data

    def close(self) -> bytes:
        if self._open is None:
            return b""
        self._open = None
        return named_event("content_block_stop", {"type": "content_block_stop", "index": self._index})

    def _grow(self, kind: str, empty: dict[str, Any], delta: dict[str, Any]) -> bytes:
        data = b""
        if self._open != kind:
            data += self.close()
            self._index += 1
            self._open = kind
            block = {"type": kind, **empty}
            data += named_event(
                "content_block_start", {"type": "content_block_start", "index": self._index, "content_block": block}
            )
        return data + named_event(
            "content_block_delta", {"type": "content_block_delta", "index": self._index, "delta": delta}
        )


def _blocks(parts: Parts) -> list[dict[str, Any]]:
    blocks: list[dict[str, Any]] = []
    if parts.reasoning:
        blocks.append({"type": "thinking", "thinking": parts.reasoning, "signature": ""})
    if parts.content:
        blocks.append({"type": "text", "text": parts.content})
    return blocks + [_tool_use(call) for call in parts.calls]


def _tool_use(call: Call) -> dict[str, Any]:
    return {
        "type": "tool_use",
        "id": f"toolu_{uuid.uuid4().hex[:24]}",
        "name": call.name,
        "input": json.loads(call.arguments),
    }


def _ending(choice: Choice) -> dict[str, Any]:
    output = choice.assembler.output
    if isinstance(output.stop_reason, str) and output.finish_reason == "stop":
        return {"stop_reason": "stop_sequence", "stop_sequence": output.stop_reason}
    return {"stop_reason": STOP_REASONS.get(output.finish_reason or "", "end_turn"), "stop_sequence": None}


def _usage(generation: Generation) -> dict[str, int]:
    cached = generation.num_cached_tokens
    return {
        "input_tokens": len(generation.prompt_token_ids) - cached,
        "cache_read_input_tokens": cached,
        "cache_creation_input_tokens": 0,
        "output_tokens": generation.num_generated_tokens,
    }


def _assistant_turn(blocks: list[dict[str, Any]]) -> list[dict[str, Any]]:
    turn: dict[str, Any] = {"role": "assistant", "content": ""}
    for block in blocks:
        kind = block.get("type")
        if kind == "text":
            turn["content"] += _text(block)
        elif kind == "thinking":
            turn["reasoning_content"] = turn.get("reasoning_content", "") + str(block.get("thinking", ""))
        elif kind == "tool_use" and isinstance(block.get("name"), str):
            function = {"name": block["name"], "arguments": json.dumps(block.get("input") or {}, ensure_ascii=False)}
            turn.setdefault("tool_calls", []).append(
                {"id": str(block.get("id")), "type": "function", "function": function}
            )
        else:
            raise _unknown(kind)
    return [turn]


def _user_turn(blocks: list[dict[str, Any]]) -> list[dict[str, Any]]:
    turns: list[dict[str, Any]] = []
    text = ""
    for block in blocks:
        kind = block.get("type")
        if kind == "text":
            text += _text(block)
        elif kind == "tool_result":
            content = block.get("content") or ""
            told = content if isinstance(content, str) else _texts(content, "messages")
            turns.append({"role": "tool", "tool_call_id": str(block.get("tool_use_id")), "content": told})
        else:
            raise _unknown(kind)
    return turns + ([{"role": "user", "content": text}] if text or not turns else [])


def _texts(blocks: Any, field: str) -> str:
    if not isinstance(blocks, list) or not all(isinstance(one, dict) and one.get("type") == "text" for one in blocks):
        raise BadRequest(f"{field}: this model reads text only", field)
    return "".join(_text(one) for one in blocks)


def _text(block: dict[str, Any]) -> str:
    text = block.get("text")
    if not isinstance(text, str):
        raise BadRequest("a text block needs a text", "messages")
    return text


def _unknown(kind: Any) -> BadRequest:
    return BadRequest(f"content block of type {kind!r}: this model reads text and tool results only", "messages")
