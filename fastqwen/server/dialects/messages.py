"""POST /v1/messages and /v1/messages/count_tokens: Anthropic's form of the same chat."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import json
import uuid
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from fastqwen.errors import BadRequest
from fastqwen.server.answer.generation import Choice, Generation, parts_of
from fastqwen.server.answer.state import ServerState
from fastqwen.server.dialects import spellings
from fastqwen.server.dialects.body import Body, CacheSalt, Count, Probability, Temperature, TopK
from fastqwen.server.dialects.chat import Chat
from fastqwen.server.dialects.conversation import MEDIA_PARTS, left_out, note_rest
from fastqwen.server.dialects.openai import noted
from fastqwen.server.dialects.schema import AnyTool, ChatRequest
from fastqwen.server.dialects.warnings import Warnings
from fastqwen.server.http.errors import in_anthropics_words
from fastqwen.server.http.sse import named_event
from fastqwen.text.answer import Parts
from fastqwen.text.tool_calls import Call

STOP_REASONS = {"stop": "end_turn", "length": "max_tokens", "tool_calls": "tool_use"}
# What is used of a block, or says nothing by itself: equal beginnings are always cached.
BLOCK_KEYS = {
    "thinking": frozenset({"type", "thinking", "signature", "cache_control"}),
    "tool_use": frozenset({"type", "id", "name", "input", "cache_control"}),
    "tool_result": frozenset({"type", "tool_use_id", "content", "is_error", "cache_control"}),
    "document": frozenset({"type", "source", "title", "context", "cache_control"}),
    "search_result": frozenset({"type", "source", "title", "content", "cache_control"}),
}
FAILED = "[the tool failed]"  # templates have no word of their own for it
HELD_THINKING = "text:"  # a signature that holds the thinking itself, where the client asked not to see it


class InputTool(AnyTool):
    type: str = "custom"
    name: str = ""
    description: str | None = None
    input_schema: dict[str, Any] | None = None
    strict: bool | None = None
    cache_control: dict[str, Any] | None = None  # equal beginnings are always cached

    @property
    def is_function(self) -> bool:
        """Anthropic's own tools have a type with a date, and no schema."""
        return self.type in ("custom", "function")


class ToolChoice(Body):
    type: Literal["auto", "any", "tool", "none"]
    name: str | None = None
    disable_parallel_tool_use: bool = False


class Thinking(Body):
    type: str
    budget_tokens: Count | None = None
    display: str | None = None  # omitted: the blocks come without their text


class OutputFormat(Body):
    type: Literal["json_schema"]
    schema_: dict[str, Any] = Field(alias="schema")


class OutputConfig(Body):
    effort: str | None = None
    format: OutputFormat | None = None


class InputMessage(Body):
    role: str
    content: Annotated[str | list[str | dict[str, Any]], BeforeValidator(spellings.content)] = ""


class CountRequest(Body):
    """What decides about a prompt's length."""

    model: str | None = None
    messages: list[InputMessage] = Field(min_length=1)
    system: str | list[str | dict[str, Any]] | None = None
    tools: list[InputTool] | None = None
    tool_choice: ToolChoice | None = None
    thinking: Thinking | None = None
    output_config: OutputConfig | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    cache_control: dict[str, Any] | None = None

    def chat_fields(self) -> dict[str, Any]:
        """The same in the words of ChatRequest. Raises BadRequest for content that cannot be had here."""
        messages = self._messages()
        fields: dict[str, Any] = {
            "model": self.model,
            "messages": messages,
            "chat_template_kwargs": self.chat_template_kwargs,
            # Anthropic's clients write an answer's beginning as a last turn of the assistant's.
            "continue_final_message": messages[-1]["role"] == "assistant" and "tool_calls" not in messages[-1],
            **self._tool_fields(),
            **self._output_fields(),
        }
        if self.thinking is not None:
            if self.thinking.type not in ("enabled", "disabled", "adaptive"):
                self.warnings.unknown("thinking.type", "it is none of enabled, disabled, adaptive")
            fields["enable_thinking"] = self.thinking.type != "disabled"
            fields["thinking_budget"] = self.thinking.budget_tokens
        return fields

    def _messages(self) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = []
        if self.system is not None:
            found.append({"role": "system", "content": self.system})
        for index, message in enumerate(self.messages):
            place = f"messages.{index}.content"
            if isinstance(message.content, str) or message.role not in ("user", "assistant"):
                found.append({"role": message.role, "content": message.content})
            elif message.role == "assistant":
                found.append(_assistant_turn(message.content, place, self.warnings))
            else:
                found += _user_turn(message.content, place, self.warnings)
        return found

    def _tool_fields(self) -> dict[str, Any]:
        fields: dict[str, Any] = {}
        if self.tools:
            fields["tools"] = [_chat_tool(tool, index) for index, tool in enumerate(self.tools)]
        choice = self.tool_choice
        if choice is not None:
            if choice.type == "tool":
                fields["tool_choice"] = {"type": "function", "function": {"name": choice.name or ""}}
            else:
                fields["tool_choice"] = {"any": "required"}.get(choice.type, choice.type)
            if choice.disable_parallel_tool_use:
                fields["parallel_tool_calls"] = False
        return fields

    def _output_fields(self) -> dict[str, Any]:
        if self.output_config is None:
            return {}
        return {
            "reasoning_effort": self.output_config.effort,
            "response_format": _chat_format(self.output_config.format),
        }


def _chat_format(wanted: OutputFormat | None) -> dict[str, Any] | None:
    return None if wanted is None else {"type": "json_schema", "json_schema": {"schema": wanted.schema_}}


def _chat_tool(tool: InputTool, index: int) -> dict[str, Any]:
    """Tools of other types keep it: the chat skips them."""
    if not tool.is_function:
        return {"type": tool.type}
    if tool.input_schema is None or not tool.name:
        missing = "name" if not tool.name else "input_schema"
        raise BadRequest(f"tools.{index}.{missing}: Field required", f"tools.{index}.{missing}")
    function = {"name": tool.name, "description": tool.description, "parameters": tool.input_schema}
    return {"type": "function", "function": {**function, "strict": tool.strict}}


class MessagesRequest(CountRequest):
    max_tokens: Count
    stream: bool = False
    stop_sequences: list[str] | None = None
    temperature: Temperature | None = None
    top_p: Probability | None = None
    top_k: TopK | None = None
    metadata: dict[str, Any] | None = None
    service_tier: str | None = None
    cache_salt: CacheSalt = ""  # vLLM's
    output_format: OutputFormat | None = None  # where output_config.format was before

    def as_chat(self) -> ChatRequest:
        same = self.model_dump(include={"max_tokens", "temperature", "top_p", "top_k", "cache_salt"})
        fields = self.chat_fields()
        if self.output_format is not None:
            fields["response_format"] = _chat_format(self.output_format)
        return ChatRequest.of(self.warnings, **fields, **same, stop=self.stop_sequences)


class Messages:
    """One request. ``events`` streams it, ``response`` waits for the whole."""

    def __init__(self, state: ServerState, body: MessagesRequest, *, explain_cache: bool) -> None:
        self._chat = Chat(state, body.as_chat(), explain_cache=explain_cache, shortens=True)
        self._model = state.model_name(body.model)
        self._id = f"msg_{uuid.uuid4().hex}"
        omitted = body.thinking is not None and body.thinking.display == "omitted"
        self._writer = _BlockWriter(omits_thinking=omitted)

    async def prepare(self) -> None:
        await asyncio.sleep(0)  # the messages were made into a chat's
        await self._chat.prepare()

    def tokens(self) -> tuple[int, int]:
        return self._chat.tokens()

    async def response(self) -> dict[str, Any]:
        generation, writer = self._chat.generation, self._writer
        async with aclosing(generation.pieces()) as pieces:
            async for _, piece in pieces:
                writer.write(parts_of(piece))
        writer.close()
        return {
            **self._head(writer.blocks),
            **_ending(generation.choices[0]),
            "usage": _usage(generation),
            **self._chat.notes(),
        }

    async def events(self) -> AsyncGenerator[bytes, None]:
        generation, writer = self._chat.generation, self._writer
        start = {**self._head([]), "stop_reason": None, "stop_sequence": None, "usage": _usage(generation)}
        yield named_event("message_start", {"type": "message_start", "message": start})
        async with aclosing(generation.pieces()) as pieces:
            async for _, piece in pieces:
                data = writer.write(parts_of(piece))
                if data:
                    yield data
        end = {"type": "message_delta", "delta": _ending(generation.choices[0]), "usage": _usage(generation)}
        yield writer.close() + named_event("message_delta", {**end, **self._chat.notes()})
        yield named_event("message_stop", {"type": "message_stop"})

    def failure(self, status: int, body: dict[str, Any]) -> bytes:
        return named_event("error", in_anthropics_words(status, body))

    def _head(self, content: list[dict[str, Any]]) -> dict[str, Any]:
        return {"id": self._id, "type": "message", "role": "assistant", "model": self._model, "content": content}


async def count_tokens(state: ServerState, body: CountRequest) -> dict[str, Any]:
    chat = Chat(state, ChatRequest.of(body.warnings, **body.chat_fields(), max_tokens=1))
    await chat.prepare()
    return {"input_tokens": len(chat.generation.prompt_token_ids), **noted(state, chat.warnings)}


class _BlockWriter:
    """Content blocks, and as events how each begins, grows and ends before the next one begins."""

    def __init__(self, *, omits_thinking: bool) -> None:
        self.blocks: list[dict[str, Any]] = []
        self._omits_thinking = omits_thinking
        self._thought = ""
        self._open: str | None = None

    def write(self, parts: Parts) -> bytes:
        data = b""
        if parts.reasoning:
            self._thought += parts.reasoning
            shown = "" if self._omits_thinking else parts.reasoning
            data += self._grow("thinking", {"thinking": "", "signature": ""}, "thinking", shown, "thinking_delta")
        if parts.content:
            data += self._grow("text", {"text": ""}, "text", parts.content, "text_delta")
        for call in parts.calls:
            block = _tool_use(call)
            data += self.close() + self._begin("tool_use", {**block, "input": {}})
            data += self._delta({"type": "input_json_delta", "partial_json": call.arguments}) + self.close()
            self.blocks[-1] = {"type": "tool_use", **block}
        return data

    def close(self) -> bytes:
        if self._open is None:
            return b""
        data = b""
        if self._open == "thinking":
            signature = _signature(self._thought, holds_text=self._omits_thinking)
            self.blocks[-1]["signature"] = signature
            self._thought = ""
            data = self._delta({"type": "signature_delta", "signature": signature})
        self._open = None
        return data + named_event("content_block_stop", {"type": "content_block_stop", "index": len(self.blocks) - 1})

    def _grow(self, kind: str, empty: dict[str, Any], key: str, text: str, delta: str) -> bytes:
        data = b"" if self._open == kind else self.close() + self._begin(kind, empty)
        self.blocks[-1][key] += text
        return data + (self._delta({"type": delta, key: text}) if text else b"")

    def _begin(self, kind: str, empty: dict[str, Any]) -> bytes:
        self._open = kind
        self.blocks.append({"type": kind, **empty})
        start = {"type": "content_block_start", "index": len(self.blocks) - 1, "content_block": {"type": kind, **empty}}
        return named_event("content_block_start", start)

    def _delta(self, delta: dict[str, Any]) -> bytes:
        event = {"type": "content_block_delta", "index": len(self.blocks) - 1, "delta": delta}
        return named_event("content_block_delta", event)


def _signature(thought: str, *, holds_text: bool) -> str:
    """Clients send thinking back only with one. It proves nothing here, but it can hold what was not shown."""
    if holds_text:
        return HELD_THINKING + base64.b64encode(thought.encode()).decode()
    return hashlib.sha256(thought.encode()).hexdigest()


def _thought_of(block: dict[str, Any]) -> str:
    told, signature = str(block.get("thinking") or ""), str(block.get("signature") or "")
    if told or not signature.startswith(HELD_THINKING):
        return told
    try:
        return base64.b64decode(signature.removeprefix(HELD_THINKING), validate=True).decode()
    except ValueError:
        return ""


def _tool_use(call: Call) -> dict[str, Any]:
    return {"id": f"toolu_{uuid.uuid4().hex[:24]}", "name": call.name, "input": json.loads(call.arguments)}


def _ending(choice: Choice) -> dict[str, Any]:
    output = choice.assembler.output
    if isinstance(output.stop_reason, str) and output.finish_reason == "stop":
        return {"stop_reason": "stop_sequence", "stop_sequence": output.stop_reason}
    return {"stop_reason": STOP_REASONS.get(output.finish_reason or "", "end_turn"), "stop_sequence": None}


def _usage(generation: Generation) -> dict[str, int]:
    """The three kinds of input are the prompt; all of it is of the first kind until it is computed."""
    read, written = generation.num_cached_tokens, generation.num_cache_written_tokens
    return {
        "input_tokens": len(generation.prompt_token_ids) - read - written,
        "cache_read_input_tokens": read,
        "cache_creation_input_tokens": written,
        "output_tokens": generation.num_generated_tokens,
    }


def _assistant_turn(blocks: Sequence[str | dict[str, Any]], place: str, warnings: Warnings) -> dict[str, Any]:
    turn: dict[str, Any] = {"role": "assistant", "content": []}
    for index, block in enumerate(blocks):
        kind = "text" if isinstance(block, str) else block.get("type")
        _note_keys(block, f"{place}.{index}", warnings)
        if isinstance(block, str) or kind == "text":
            turn["content"].append(block)
        elif kind == "thinking":
            turn["reasoning_content"] = turn.get("reasoning_content", "") + _thought_of(block)
        elif kind == "tool_use":
            function = {"name": block.get("name"), "arguments": block.get("input") or {}}
            call = {"id": str(block.get("id")), "type": "function", "function": function}
            turn.setdefault("tool_calls", []).append(call)
        else:
            warnings.unknown(f"{place}.{index}", f"blocks of type {str(kind)[:100]!r} are not known here")
    return turn


def _user_turn(blocks: Sequence[str | dict[str, Any]], place: str, warnings: Warnings) -> list[dict[str, Any]]:
    """Results first, as the template's turns of role tool; then what the user says.

    Media beside a result are the tool's: refusing them would end a session that can do nothing about it.
    """
    turns: list[dict[str, Any]] = []
    parts: list[str | dict[str, Any]] = []
    has_results = any(isinstance(block, dict) and block.get("type") == "tool_result" for block in blocks)
    for index, block in enumerate(blocks):
        kind = "text" if isinstance(block, str) else block.get("type")
        _note_keys(block, f"{place}.{index}", warnings)
        if isinstance(block, dict) and kind == "tool_result":
            told = _told(block.get("content"))
            if block.get("is_error") is True:
                told = [FAILED, *(["\n"] if told else []), *(told if isinstance(told, list) else [told or ""])]
            turns.append({"role": "tool", "tool_call_id": str(block.get("tool_use_id")), "content": told})
        else:
            [part] = _told([block])
            if has_results and isinstance(part, dict) and part.get("type") in MEDIA_PARTS:
                warnings.tell(f"{place}.{index} is left out: this model reads text only, and gets a note in its place")
                part = left_out(kind)
            parts.append(part)
    return turns + ([{"role": "user", "content": parts}] if parts or not turns else [])


def _note_keys(block: str | dict[str, Any], place: str, warnings: Warnings) -> None:
    if isinstance(block, dict) and (known := BLOCK_KEYS.get(str(block.get("type")))) is not None:
        note_rest(block, known, place, warnings)


def _told(content: Any) -> Any:
    """Blocks as the chat's parts: documents and search results that are text become it."""
    if not isinstance(content, list):
        return content if isinstance(content, str) or content is None else json.dumps(content, ensure_ascii=False)
    return [_as_text(block) if isinstance(block, dict) else block for block in content]


def _as_text(block: dict[str, Any]) -> dict[str, Any]:
    source = block.get("source")
    if block.get("type") == "document" and isinstance(source, dict) and source.get("type") in ("text", "content"):
        inner = source.get("data", source.get("content"))
    elif block.get("type") == "search_result":
        inner = block.get("content")
    else:
        return block
    texts = (
        [inner]
        if isinstance(inner, str)
        else [str(one.get("text", "")) for one in inner or [] if isinstance(one, dict)]
    )
    heads = [block.get("title"), block.get("context"), source if isinstance(source, str) else None]
    return {"type": "text", "text": "\n".join([*(one for one in heads if isinstance(one, str)), *texts])}
