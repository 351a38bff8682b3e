"""POST /v1/responses: OpenAI's newer form of the same chat. The last answers are remembered, unless store is false."""

from __future__ import annotations

import base64
import time
import uuid
from collections.abc import AsyncGenerator, Callable, Iterator
from contextlib import aclosing
from typing import Any

from fastqwen.outputs import Logprob
from fastqwen.server.answer.generation import parts_of
from fastqwen.server.answer.state import ServerState
from fastqwen.server.dialects.body import Body
from fastqwen.server.dialects.chat import Chat
from fastqwen.server.dialects.responses_request import ENCRYPTED, FunctionTool, ResponsesRequest
from fastqwen.server.http.sse import named_event
from fastqwen.text.answer import Parts
from fastqwen.text.tool_calls import Call


class Responses:
    """One request. ``events`` streams it, ``response`` waits for the whole."""

    def __init__(self, state: ServerState, body: ResponsesRequest, *, explain_cache: bool) -> None:
        self._state = state
        self._body = body
        self._items = body.conversation_items(state.responses)
        self._chat = Chat(state, body.as_chat(self._items), explain_cache=explain_cache, shortens=True)
        self._model = state.model_name(body.model)
        self._id = _new_id("resp") if body.request_id is None else f"resp_{body.request_id.removeprefix('resp_')}"
        self._created = int(time.time())
        self._num_events = 0
        self._writer = _ItemWriter(
            shows_reasoning=body.include_reasoning is not False,
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
        whole = {
            **self._head("incomplete" if cut else "completed", items),
            "usage": usage,
            "incomplete_details": details,
            **self._messages(),
            **self._chat.measured(),
            **self._chat.notes(),
        }
        if self._body.store is not False:
            self._state.responses.keep(self._id, self._items, items, whole)
        return whole

    def _messages(self) -> dict[str, Any]:
        """What went into the model and what came out of it, as text and as tokens, for who asks."""
        if not self._body.enable_response_messages:
            return {}
        generation, tokenizer = self._chat.generation, self._state.text.tokenizer
        [output] = generation.outputs
        said = {"input_messages": generation.prompt_token_ids, "output_messages": output.token_ids}
        return {
            name: [{"type": "raw_message_tokens", "message": tokenizer.decode(token_ids), "tokens": token_ids}]
            for name, token_ids in said.items()
        }

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
        self,
        *,
        shows_reasoning: bool,
        holds_reasoning: bool,
        logprobs: Callable[[dict[int, Logprob]], dict[str, Any]] | None,
    ) -> None:
        self.items: list[dict[str, Any]] = []
        self._open = ""
        self._shows_reasoning = shows_reasoning
        self._holds_reasoning = holds_reasoning
        self._logprobs_of = logprobs

    def write(self, parts: Parts, logprobs: list[dict[int, Logprob]] | None) -> Events:
        if parts.reasoning and self._shows_reasoning:
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
