"""POST /v1/responses: OpenAI's newer form of the same chat, without a memory on the server."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, Iterator
from contextlib import aclosing
from typing import Any, Literal

from fastqwen.errors import BadRequest
from fastqwen.server.answer.generation import parts_of
from fastqwen.server.answer.state import ServerState, new_id
from fastqwen.server.dialects.chat import Chat
from fastqwen.server.dialects.schema import (
    AccountFields,
    Body,
    ChatRequest,
    Count,
    Effort,
    Function,
    JsonSchemaFormat,
    Probability,
    Temperature,
)
from fastqwen.server.http.sse import named_event
from fastqwen.text.answer import Parts
from fastqwen.text.tool_calls import Call

# Fields that need a server with a memory, or with tools of its own, and what to do instead.
REFUSED = {
    "previous_response_id": "responses are not stored: send the earlier turns in input",
    "conversation": "conversations are not stored: send the earlier turns in input",
    "background": "there are no background responses: use stream",
    "prompt": "there are no stored prompts: use instructions",
}

SAME_IN_CHAT = {
    "model", "temperature", "top_p", "parallel_tool_calls", "user", "safety_identifier", "service_tier", "prompt_cache_key",
}  # fmt: skip


class FunctionTool(Function):
    type: Literal["function"]


class NamedFunctionTool(Body):
    type: Literal["function"]
    name: str


class Reasoning(Body):
    effort: Effort | None = None
    summary: str | None = None


class TextFormat(JsonSchemaFormat):
    type: Literal["text", "json_object", "json_schema"]


class TextOptions(Body):
    format: TextFormat | None = None


class ResponsesRequest(AccountFields):
    model: str | None = None
    input: str | list[dict[str, Any]]
    instructions: str | None = None
    max_output_tokens: Count | None = None
    temperature: Temperature | None = None
    top_p: Probability | None = None
    stream: bool = False
    tools: list[FunctionTool] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedFunctionTool | None = None
    parallel_tool_calls: bool | None = None
    reasoning: Reasoning | None = None
    text: TextOptions | None = None
    previous_response_id: str | None = None
    conversation: str | dict[str, Any] | None = None
    background: bool | None = None
    prompt: dict[str, Any] | None = None
    truncation: Literal["disabled"] | None = None
    include: list[str] | None = None

    def as_chat(self) -> ChatRequest:
        """Raises BadRequest for what needs a server with a memory."""
        for name, advice in REFUSED.items():
            if getattr(self, name):
                raise BadRequest(f"{name} is not supported: {advice}", name)
        if self.store:
            raise BadRequest("store is not supported: responses are not kept; leave it out or send false", "store")
        if self.include and self.include != ["reasoning.encrypted_content"]:
            raise BadRequest(f"include {self.include[0]!r} is not supported", "include")
        fields = self.model_dump(include=SAME_IN_CHAT)
        fields.update(messages=self._messages(), max_tokens=self.max_output_tokens)
        if self.tools:
            fields["tools"] = [{"type": "function", "function": one.model_dump(exclude={"type"})} for one in self.tools]
        if isinstance(self.tool_choice, NamedFunctionTool):
            fields["tool_choice"] = {"type": "function", "function": {"name": self.tool_choice.name}}
        else:
            fields["tool_choice"] = self.tool_choice
        text_format = self.text.format if self.text is not None else None
        if text_format is not None:
            schema = (
                text_format.model_dump(by_alias=True, exclude={"type"}) if text_format.type == "json_schema" else None
            )
            fields["response_format"] = {"type": text_format.type, "json_schema": schema}
        if self.reasoning is not None:
            fields["reasoning_effort"] = self.reasoning.effort
        return ChatRequest.of(**fields)

    def warnings(self) -> list[str]:
        """What is accepted because clients send it always, though the answer holds it anyhow."""
        found = []
        if self.reasoning is not None and self.reasoning.summary is not None:
            found.append("reasoning.summary has no effect: the reasoning itself is given")
        if self.include:
            found.append(f"include {self.include[0]} has no effect: the reasoning is given in plain text")
        return found

    def _messages(self) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = []
        if self.instructions:
            found.append({"role": "system", "content": self.instructions})
        items = [{"role": "user", "content": self.input}] if isinstance(self.input, str) else self.input
        for item in items:
            _add_item(found, item)
        return found


def _add_item(messages: list[dict[str, Any]], item: dict[str, Any]) -> None:
    kind = item.get("type", "message")
    if kind == "message":
        message = {"role": item.get("role", "user"), "content": item.get("content")}
        if message["role"] == "assistant" and messages and messages[-1].get("content", "") is None:
            messages[-1]["content"] = message["content"]  # the reasoning before it belongs to the same turn
        else:
            messages.append(message)
    elif kind == "function_call":
        if not messages or messages[-1]["role"] != "assistant":
            messages.append({"role": "assistant", "content": None})
        function = {"name": item.get("name"), "arguments": item.get("arguments") or "{}"}
        call = {"id": str(item.get("call_id")), "type": "function", "function": function}
        messages[-1].setdefault("tool_calls", []).append(call)
    elif kind == "function_call_output":
        output = item.get("output")
        messages.append({"role": "tool", "tool_call_id": str(item.get("call_id")), "content": output})
    elif kind == "reasoning":
        texts = [part.get("text", "") for part in item.get("content") or [] if isinstance(part, dict)]
        messages.append({"role": "assistant", "content": None, "reasoning_content": "".join(texts)})
    else:
        raise BadRequest(f"input item of type {kind!r} is not supported", "input")


class Responses:
    """One request. ``events`` streams it, ``response`` waits for the whole."""

    def __init__(self, state: ServerState, body: ResponsesRequest, *, explain_cache: bool) -> None:
        self._body = body
        self._chat = Chat(state, body.as_chat(), explain_cache=explain_cache)
        self._model = state.model_name(body.model)
        self._id = new_id("resp")
        self._created = int(time.time())

    async def prepare(self) -> None:
        await self._chat.prepare()

    def tokens(self) -> tuple[int, int]:
        return self._chat.tokens()

    async def response(self) -> dict[str, Any]:
        await self._chat.generation.finish()
        writer = _ItemWriter()
        list(writer.write(self._chat.generation.choices[0].answer))
        list(writer.close())
        return self._whole(writer.items)

    async def events(self) -> AsyncGenerator[bytes, None]:
        writer = _ItemWriter()
        number = 0

        def encoded(kind: str, **values: Any) -> bytes:
            nonlocal number
            number += 1
            return named_event(kind, {"type": kind, "sequence_number": number - 1, **values})

        yield encoded("response.created", response=self._head("in_progress", []))
        yield encoded("response.in_progress", response=self._head("in_progress", []))
        async with aclosing(self._chat.generation.pieces()) as pieces:
            async for _, piece in pieces:
                data = b"".join(encoded(kind, **values) for kind, values in writer.write(parts_of(piece)))
                if data:
                    yield data
        yield b"".join(encoded(kind, **values) for kind, values in writer.close())
        whole = self._whole(writer.items)
        yield encoded(f"response.{whole['status']}", response=whole)

    def _whole(self, items: list[dict[str, Any]]) -> dict[str, Any]:
        generation = self._chat.generation
        cut = generation.outputs[0].finish_reason == "length"
        usage = {
            "input_tokens": len(generation.prompt_token_ids),
            "input_tokens_details": {"cached_tokens": generation.num_cached_tokens},
            "output_tokens": generation.num_generated_tokens,
            "output_tokens_details": {"reasoning_tokens": generation.choices[0].num_thinking_tokens},
            "total_tokens": len(generation.prompt_token_ids) + generation.num_generated_tokens,
        }
        details = {"reason": "max_output_tokens"} if cut else None
        whole = self._head("incomplete" if cut else "completed", items)
        notes = self._chat.notes()
        warnings = [*notes.pop("warnings", []), *self._body.warnings()]
        notes.update({"warnings": warnings} if warnings else {})
        return {**whole, "usage": usage, "incomplete_details": details, **notes}

    def _head(self, status: str, items: list[dict[str, Any]]) -> dict[str, Any]:
        body = self._body
        choice = body.tool_choice
        return {
            "id": self._id,
            "object": "response",
            "created_at": self._created,
            "status": status,
            "error": None,
            "incomplete_details": None,
            "instructions": body.instructions,
            "max_output_tokens": body.max_output_tokens,
            "metadata": body.metadata or {},
            "model": self._model,
            "output": items,
            "parallel_tool_calls": body.parallel_tool_calls is not False,
            "previous_response_id": None,
            "store": False,
            "temperature": body.temperature,
            "tool_choice": choice.model_dump() if isinstance(choice, NamedFunctionTool) else choice or "auto",
            "tools": [tool.model_dump() for tool in body.tools or []],
            "top_p": body.top_p,
            "truncation": "disabled",
        }


Events = Iterator[tuple[str, dict[str, Any]]]


class _ItemWriter:
    """Output items, and the events that tell how they grow."""

    def __init__(self) -> None:
        self.items: list[dict[str, Any]] = []
        self._open = ""

    def write(self, parts: Parts) -> Events:
        if parts.reasoning:
            yield from self._grow("reasoning", parts.reasoning)
        if parts.content:
            yield from self._grow("message", parts.content)
        for call in parts.calls:
            yield from self.close()
            yield from self._call(call)

    def close(self) -> Events:
        if not self._open:
            return
        item, where = self.items[-1], self._where()
        part = item["content"][0]
        kind = "output_text" if self._open == "message" else "reasoning_text"
        yield f"response.{kind}.done", {**where, "content_index": 0, "text": part["text"], **_logprobs(kind)}
        yield "response.content_part.done", {**where, "content_index": 0, "part": dict(part)}
        item["status"] = "completed"
        yield "response.output_item.done", {"output_index": where["output_index"], "item": dict(item)}
        self._open = ""

    def _grow(self, kind: str, text: str) -> Events:
        part_kind = "output_text" if kind == "message" else "reasoning_text"
        if self._open != kind:
            yield from self.close()
            self._open = kind
            head: dict[str, Any] = {"role": "assistant"} if kind == "message" else {"summary": []}
            item: dict[str, Any] = {"id": new_id(kind), "type": kind, "status": "in_progress", **head, "content": []}
            self.items.append(item)
            yield "response.output_item.added", {"output_index": len(self.items) - 1, "item": {**item, "content": []}}
            part = {"type": part_kind, "text": "", **({"annotations": []} if kind == "message" else {})}
            item["content"].append(part)
            yield "response.content_part.added", {**self._where(), "content_index": 0, "part": dict(part)}
        self.items[-1]["content"][0]["text"] += text
        yield (
            f"response.{part_kind}.delta",
            {**self._where(), "content_index": 0, "delta": text, **_logprobs(part_kind)},
        )

    def _call(self, call: Call) -> Events:
        item = {
            "id": new_id("fc"),
            "type": "function_call",
            "call_id": new_id("call"),
            "name": call.name,
            "arguments": call.arguments,
            "status": "completed",
        }
        self.items.append(item)
        begun = {**item, "arguments": "", "status": "in_progress"}
        yield "response.output_item.added", {"output_index": len(self.items) - 1, "item": begun}
        yield "response.function_call_arguments.delta", {**self._where(), "delta": call.arguments}
        yield "response.function_call_arguments.done", {**self._where(), "name": call.name, "arguments": call.arguments}
        yield "response.output_item.done", {"output_index": len(self.items) - 1, "item": item}

    def _where(self) -> dict[str, Any]:
        return {"item_id": self.items[-1]["id"], "output_index": len(self.items) - 1}


def _logprobs(kind: str) -> dict[str, Any]:
    return {"logprobs": []} if kind == "output_text" else {}
