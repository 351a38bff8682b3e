"""What /v1/responses is asked: its fields, and a conversation's items as the messages of a chat."""

from __future__ import annotations

import base64
import json
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from fastqwen.errors import BadRequest
from fastqwen.server.answer.response_store import ResponseStore
from fastqwen.server.dialects import spellings
from fastqwen.server.dialects.body import (
    Body,
    CacheSalt,
    Count,
    Logprobs,
    Penalty,
    Priority,
    Probability,
    Seed,
    Temperature,
    TopK,
    Whole,
)
from fastqwen.server.dialects.conversation import note_rest
from fastqwen.server.dialects.schema import AccountFields, AnyTool, ChatRequest, JsonSchemaFormat, StructuredFields
from fastqwen.server.dialects.warnings import Warnings

# Fields that need a server with a memory for longer, and what to do instead.
REFUSED = {
    "conversation": "conversations are not stored: send previous_response_id, or the earlier turns in input",
    "background": "there are no background responses: use stream",
    "prompt": "there are no stored prompts: use instructions",
    "previous_input_messages": "send the earlier turns in input",
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
    "stop", "chat_template_kwargs", "parallel_tool_calls", "logit_bias", "stop_token_ids", "ignore_eos", "skip_special_tokens",
    "include_stop_str_in_output", "include_reasoning", "priority", "cache_salt",
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
    logit_bias: dict[str, float] | None = None
    stop_token_ids: list[Whole] | None = None
    ignore_eos: bool | None = None
    skip_special_tokens: bool | None = None
    include_stop_str_in_output: bool | None = None
    include_reasoning: bool | None = None
    structured_outputs: StructuredFields | None = None
    priority: Priority = 0
    cache_salt: CacheSalt = ""
    request_id: Annotated[str, Field(pattern=r"^[A-Za-z0-9_.:/+=@-]{1,128}$")] | None = None
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
    previous_input_messages: list[dict[str, Any]] | None = None
    truncation: str | None = None
    include: list[str] | None = None
    enable_response_messages: bool = False

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
        if self.structured_outputs is not None:
            fields["structured_outputs"] = self.structured_outputs.model_dump(by_alias=True)
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
