"""POST /v1/responses: OpenAI's newer form of the same chat. The last answers are remembered, unless store is false."""

from __future__ import annotations

import base64
import json
import time
import uuid
from collections.abc import AsyncGenerator, Callable, Iterator
from contextlib import aclosing
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator

from fastqwen.errors import BadRequest
from fastqwen.outputs import Logprob
from fastqwen.server.answer.generation import parts_of
from fastqwen.server.answer.response_store import ResponseStore
from fastqwen.server.answer.state import ServerState
from fastqwen.server.dialects import spellings
from fastqwen.server.dialects.chat import Chat
from fastqwen.server.dialects.conversation import note_rest
from fastqwen.server.dialects.schema import (
    AccountFields,
    AnyTool,
    Body,
    ChatRequest,
    Count,
    JsonSchemaFormat,
    Logprobs,
    Penalty,
    Probability,
    Seed,
    Temperature,
    TopK,
)
from fastqwen.server.dialects.warnings import Warnings
from fastqwen.server.http.sse import named_event
from fastqwen.text.answer import Parts
from fastqwen.text.tool_calls import Call

# Fields that need a server with a memory for longer, and what to do instead.
REFUSED = {
    "conversation": "conversations are not stored: send previous_response_id, or the earlier turns in input",
    "background": "there are no background responses: use stream",
    "prompt": "there are no stored prompts: use instructions",
}
ENCRYPTED = "reasoning.encrypted_content"
LOGPROBS = "message.output_text.logprobs"
# What is used of an item, or says nothing by itself.
CALL_KEYS = frozenset({"type", "id", "call_id", "name", "arguments", "input", "action", "status"})
ITEM_KEYS = {
    "message": frozenset({"type", "id", "role", "content", "status"}),
    "reasoning": frozenset({"type", "id", "content", "summary", "encrypted_content", "status"}),
    **dict.fromkeys(("function_call", "custom_tool_call", "local_shell_call", "shell_call"), CALL_KEYS),
    **dict.fromkeys(
        ("function_call_output", "custom_tool_call_output"), frozenset({"type", "id", "call_id", "output", "status"})
    ),
}

SAME_IN_CHAT = {
    "model", "temperature", "top_p", "top_k", "min_p", "presence_penalty", "frequency_penalty", "repetition_penalty", "seed",
    "stop", "chat_template_kwargs", "parallel_tool_calls",
}  # fmt: skip


class FunctionTool(AnyTool):
    name: str = ""
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class ChosenFunction(Body):
    type: str
    name: str | None = None
    mode: Literal["auto", "required"] | None = None
    tools: list[dict[str, Any]] | None = None


class Reasoning(Body):
    effort: str | None = None
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
    top_k: TopK | None = None
    min_p: Probability | None = None
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    repetition_penalty: float | None = None
    seed: Seed | None = None
    stop: str | list[str] | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    top_logprobs: Logprobs | None = None
    stream: bool = False
    tools: list[Annotated[FunctionTool, BeforeValidator(spellings.flat_tool)]] | None = None
    tool_choice: Literal["none", "auto", "required"] | ChosenFunction | None = None
    parallel_tool_calls: bool | None = None
    reasoning: Reasoning | None = None
    text: TextOptions | None = None
    previous_response_id: str | None = None
    conversation: str | dict[str, Any] | None = None
    background: bool | None = None
    prompt: dict[str, Any] | None = None
    truncation: str | None = None
    include: list[str] | None = None

    def look_through(self, *, strict: bool) -> None:
        store, self.store = self.store, None  # it has an effect here
        super().look_through(strict=strict)
        self.store = store
        for name, advice in REFUSED.items():
            if getattr(self, name):
                raise BadRequest(f"{name} is not supported: {advice}", name)
        for one in self.include or []:
            if one not in (ENCRYPTED, LOGPROBS):
                self.warnings.unknown(f"include {one[:100]!r}")
        if self.reasoning is not None and self.reasoning.summary is not None:
            self.warnings.tell("reasoning.summary has no effect: the reasoning itself is given")
        if self.truncation not in (None, "disabled"):
            self.warnings.tell("truncation has no effect: a conversation that is too long is refused")

    @property
    def wants_logprobs(self) -> bool:
        return LOGPROBS in (self.include or []) or self.top_logprobs is not None

    def conversation_items(self, store: ResponseStore) -> list[dict[str, Any]]:
        """Everything up to the answer, references replaced by what they mean. Raises BadRequest for what is not kept."""
        before: list[dict[str, Any]] = []
        if self.previous_response_id is not None:
            kept = store.conversation(self.previous_response_id)
            if kept is None:
                raise BadRequest(
                    f"previous_response_id {self.previous_response_id[:100]!r} is not kept here (any more): "
                    "send the earlier turns in input",
                    "previous_response_id",
                    "previous_response_not_found",
                )
            before = kept
        items = [{"role": "user", "content": self.input}] if isinstance(self.input, str) else self.input
        if not before and not items:
            raise BadRequest("input is empty: send a text or at least one item", "input")
        return before + [_referred(item, store) for item in items]

    def as_chat(self, items: list[dict[str, Any]]) -> ChatRequest:
        fields = self.model_dump(include=SAME_IN_CHAT)
        fields.update(messages=self._messages(items), max_tokens=self.max_output_tokens)
        if self.wants_logprobs:
            fields.update(logprobs=True, top_logprobs=self.top_logprobs or 0)
        if self.tools:
            fields["tools"] = [_chat_tool(tool, index) for index, tool in enumerate(self.tools)]
        fields["tool_choice"] = _chat_choice(self.tool_choice)
        wanted = self.text.format if self.text is not None else None
        if wanted is not None:
            schema = {"name": wanted.name, "schema": wanted.schema_} if wanted.type == "json_schema" else None
            fields["response_format"] = {"type": wanted.type, "json_schema": schema}
        if self.reasoning is not None:
            fields["reasoning_effort"] = self.reasoning.effort
        return ChatRequest.of(self.warnings, **fields)

    def _messages(self, items: list[dict[str, Any]]) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = []
        if self.instructions:
            found.append({"role": "system", "content": self.instructions})
        for index, item in enumerate(items):
            _add_item(found, item, f"input.{index}", self.warnings)
        return found


def _referred(item: dict[str, Any], store: ResponseStore) -> dict[str, Any]:
    is_reference = item.get("type") == "item_reference" or ("type" not in item and "role" not in item)
    if not is_reference:
        return item
    found = store.item(str(item.get("id")))
    if found is None:
        raise BadRequest(
            f"the item {str(item.get('id'))[:100]!r} is not kept here (any more): send the item itself", "input"
        )
    return found


def _chat_tool(tool: FunctionTool, index: int) -> dict[str, Any]:
    if not tool.is_function:
        return {"type": tool.type}
    if not tool.name:
        raise BadRequest(f"tools.{index}.name: Field required", f"tools.{index}.name")
    function = {name: getattr(tool, name) for name in ("name", "description", "parameters", "strict")}
    return {"type": "function", "function": function}


def _chat_choice(choice: str | ChosenFunction | None) -> Any:
    if not isinstance(choice, ChosenFunction):
        return choice
    if choice.type == "allowed_tools":
        return {"type": choice.type, "allowed_tools": {"mode": choice.mode or "auto", "tools": choice.tools or []}}
    if choice.type != "function" or not choice.name:
        return {"type": choice.type}  # a word that the chat knows, or none of its tools
    return {"type": choice.type, "function": {"name": choice.name}}


def _add_item(messages: list[dict[str, Any]], item: dict[str, Any], place: str, warnings: Warnings) -> None:
    kind = str(item.get("type", "message"))
    if kind in ITEM_KEYS:
        note_rest(item, ITEM_KEYS[kind], place, warnings)
    if kind == "message":
        message = {"role": item.get("role", "user"), "content": item.get("content")}
        if message["role"] == "assistant" and messages and messages[-1].get("content", "") is None:
            messages[-1]["content"] = message["content"]  # the reasoning before it belongs to the same turn
        else:
            messages.append(message)
    elif kind in ("function_call", "custom_tool_call", "local_shell_call", "shell_call"):
        if not messages or messages[-1]["role"] != "assistant":
            messages.append({"role": "assistant", "content": None})
        messages[-1].setdefault("tool_calls", []).append(_call_of(item, kind))
    elif kind.endswith("_call_output"):
        output = item.get("output")
        told = output if output is None or isinstance(output, (str, list)) else json.dumps(output, ensure_ascii=False)
        messages.append({"role": "tool", "tool_call_id": str(item.get("call_id")), "content": told})
    elif kind == "reasoning":
        messages.append(
            {"role": "assistant", "content": None, "reasoning_content": _reasoning_of(item, place, warnings)}
        )
    else:
        warnings.unknown(place, f"items of type {kind[:100]!r} are not known here")


def _call_of(item: dict[str, Any], kind: str) -> dict[str, Any]:
    function = {"name": item.get("name"), "arguments": item.get("arguments")}
    if kind == "custom_tool_call":
        function["arguments"] = {"input": item.get("input")}
    elif kind != "function_call":
        function = {"name": kind.removesuffix("_call"), "arguments": item.get("action")}
    return {"id": str(item.get("call_id")), "type": "function", "function": function}


def _reasoning_of(item: dict[str, Any], place: str, warnings: Warnings) -> str:
    """Its text; else what was handed out in place of it, which is called encrypted; else its summary."""
    parts = item.get("content") or item.get("summary") or []
    texts = "".join(str(part.get("text") or "") for part in parts if isinstance(part, dict))
    held = item.get("encrypted_content")
    if item.get("content") or not isinstance(held, str) or not held:
        return texts
    try:
        return base64.b64decode(held, validate=True).decode()
    except ValueError:
        warnings.tell(f"{place}.encrypted_content has no effect: another server wrote it")
        return texts


class Responses:
    """One request. ``events`` streams it, ``response`` waits for the whole."""

    def __init__(self, state: ServerState, body: ResponsesRequest, *, explain_cache: bool) -> None:
        self._state = state
        self._body = body
        self._items = body.conversation_items(state.responses)
        self._chat = Chat(state, body.as_chat(self._items), explain_cache=explain_cache, shortens=True)
        self._model = state.model_name(body.model)
        self._id = _new_id("resp")
        self._created = int(time.time())
        self._num_events = 0
        self._writer = _ItemWriter(
            holds_reasoning=ENCRYPTED in (body.include or []),
            logprobs=self._chat.token_logprobs if body.wants_logprobs else None,
        )

    async def prepare(self) -> None:
        await self._chat.prepare()

    def tokens(self) -> tuple[int, int]:
        return self._chat.tokens()

    async def response(self) -> dict[str, Any]:
        writer = self._writer
        async with aclosing(self._chat.generation.pieces()) as pieces:
            async for _, piece in pieces:
                list(writer.write(parts_of(piece), piece.logprobs))
        list(writer.close())
        return self._whole(writer.items)

    async def events(self) -> AsyncGenerator[bytes, None]:
        writer, encoded = self._writer, self._event
        yield encoded("response.created", response=self._head("in_progress", []))
        yield encoded("response.in_progress", response=self._head("in_progress", []))
        async with aclosing(self._chat.generation.pieces()) as pieces:
            async for _, piece in pieces:
                data = b"".join(
                    encoded(kind, **values) for kind, values in writer.write(parts_of(piece), piece.logprobs)
                )
                if data:
                    yield data
        yield b"".join(encoded(kind, **values) for kind, values in writer.close())
        whole = self._whole(writer.items)
        yield encoded(f"response.{whole['status']}", response=whole)

    def failure(self, status: int, body: dict[str, Any]) -> bytes:
        error = body["error"]
        code = error["code"] or error["type"]
        return self._event("error", code=code, message=error["message"], param=error["param"])

    def _event(self, kind: str, **values: Any) -> bytes:
        self._num_events += 1
        return named_event(kind, {"type": kind, "sequence_number": self._num_events - 1, **values})

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
        if self._body.store is not False:
            self._state.responses.keep(self._id, self._items, items)
        return {**whole, "usage": usage, "incomplete_details": details, **self._chat.notes()}

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
            "previous_response_id": body.previous_response_id,
            "reasoning": {"effort": None, "summary": None} if body.reasoning is None else body.reasoning.model_dump(),
            "store": body.store is not False,
            "temperature": body.temperature,
            "tool_choice": choice.model_dump(exclude_none=True) if isinstance(choice, Body) else choice or "auto",
            "text": {"format": {"type": "text"}} if body.text is None else body.text.model_dump(by_alias=True),
            "tools": [_as_sent(tool) for tool in body.tools or []],
            "top_logprobs": body.top_logprobs or 0,
            "top_p": body.top_p,
            "truncation": "disabled",
        }


Events = Iterator[tuple[str, dict[str, Any]]]


class _ItemWriter:
    """Output items, and the events that tell how they grow."""

    def __init__(
        self, *, holds_reasoning: bool, logprobs: Callable[[dict[int, Logprob]], dict[str, Any]] | None
    ) -> None:
        self.items: list[dict[str, Any]] = []
        self._open = ""
        self._holds_reasoning = holds_reasoning
        self._logprobs_of = logprobs

    def write(self, parts: Parts, logprobs: list[dict[int, Logprob]] | None) -> Events:
        if parts.reasoning:
            yield from self._grow("reasoning", parts.reasoning)
        if parts.content:
            listed = [self._logprobs_of(one) for one in logprobs or []] if self._logprobs_of is not None else []
            yield from self._grow("message", parts.content, listed)
        for call in parts.calls:
            yield from self.close()
            yield from self._call(call)

    def close(self) -> Events:
        if not self._open:
            return
        item, where = self.items[-1], self._where()
        part = item["content"][0]
        kind = "output_text" if self._open == "message" else "reasoning_text"
        logprobs = {"logprobs": part["logprobs"]} if kind == "output_text" else {}
        if kind == "reasoning_text" and self._holds_reasoning:
            item["encrypted_content"] = base64.b64encode(part["text"].encode()).decode()
        yield f"response.{kind}.done", {**where, "content_index": 0, "text": part["text"], **logprobs}
        yield "response.content_part.done", {**where, "content_index": 0, "part": dict(part)}
        item["status"] = "completed"
        yield "response.output_item.done", {"output_index": where["output_index"], "item": dict(item)}
        self._open = ""

    def _grow(self, kind: str, text: str, logprobs: list[dict[str, Any]] | None = None) -> Events:
        part_kind = "output_text" if kind == "message" else "reasoning_text"
        if self._open != kind:
            yield from self.close()
            self._open = kind
            head: dict[str, Any] = {"role": "assistant"} if kind == "message" else {"summary": []}
            prefix = "msg" if kind == "message" else "rs"
            item: dict[str, Any] = {"id": _new_id(prefix), "type": kind, "status": "in_progress", **head, "content": []}
            self.items.append(item)
            yield "response.output_item.added", {"output_index": len(self.items) - 1, "item": {**item, "content": []}}
            more: dict[str, Any] = {"annotations": [], "logprobs": []} if kind == "message" else {}
            item["content"].append({"type": part_kind, "text": "", **more})
            part = {"type": part_kind, "text": "", **more, **({"logprobs": []} if more else {})}
            yield "response.content_part.added", {**self._where(), "content_index": 0, "part": part}
        grown = self.items[-1]["content"][0]
        grown["text"] += text
        if kind == "message":
            grown["logprobs"].extend(logprobs or [])
        more = {"logprobs": logprobs or []} if kind == "message" else {}
        yield f"response.{part_kind}.delta", {**self._where(), "content_index": 0, "delta": text, **more}

    def _call(self, call: Call) -> Events:
        item = {
            "id": _new_id("fc"),
            "type": "function_call",
            "call_id": _new_id("call"),
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


def _as_sent(tool: FunctionTool) -> dict[str, Any]:
    return tool.model_dump() if tool.is_function else tool.model_dump(exclude_defaults=True)


def _new_id(prefix: str) -> str:
    return f"{prefix}_{uuid.uuid4().hex}"
