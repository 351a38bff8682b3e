"""Request bodies. Every field acts, or is listed in ``WITHOUT_EFFECT`` and answered with a warning; others are refused."""

from __future__ import annotations

import math
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, Field, ValidationError

from fastqwen.errors import BadRequest
from fastqwen.records import MAX_LOGIT_BIAS, MAX_LOGPROBS, MAX_N, SamplingParams, StructuredOutputs
from fastqwen.server.dialects.fail_fast import FailFastModel
from fastqwen.text.strict_json import StrictJsonError, loads

# What has no meaning on a server of one's own.
WITHOUT_EFFECT = frozenset({"user", "metadata", "store", "safety_identifier", "service_tier", "prompt_cache_key"})
MAX_TOOLS = 128
PLAIN = frozenset({int, float, bool, type(None)})

Probability = Annotated[float, Field(ge=0.0, le=1.0)]
Penalty = Annotated[float, Field(ge=-2.0, le=2.0)]
Temperature = Annotated[float, Field(ge=0.0, le=100.0)]
TopK = Annotated[int, Field(ge=-1, lt=2**31)]
Priority = Annotated[int, Field(ge=-(2**31), lt=2**31)]
CacheSalt = Annotated[str, Field(max_length=256)]
Effort = Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"]
Count = Annotated[int, Field(ge=1, lt=2**31)]

B = TypeVar("B", bound=BaseModel)


class Body(FailFastModel, extra="forbid", strict=True, allow_inf_nan=False):
    def warnings(self) -> list[str]:
        given = sorted(name for name in WITHOUT_EFFECT if getattr(self, name, None) is not None)
        return [f"{name} has no effect on this server" for name in given]


class StreamOptions(Body):
    include_usage: bool = False
    continuous_usage_stats: bool = False


class JsonSchemaFormat(Body):
    name: str | None = None
    description: str | None = None
    schema_: Annotated[dict[str, Any] | None, Field(alias="schema")] = None
    strict: bool | None = None


class ResponseFormat(Body):
    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchemaFormat | None = None


class StructuredFields(Body):
    """vLLM's name for the forms that ``response_format`` asks for, and some more."""

    json_: Annotated[str | dict[str, Any] | bool | None, Field(alias="json")] = None
    regex: str | None = None
    choice: list[str] | None = None
    grammar: str | None = None
    json_object: bool | None = None


class AccountFields(Body):
    """What OpenAI's clients send for its accounts, bills and records."""

    user: str | None = None
    metadata: dict[str, Any] | None = None
    store: bool | None = None
    safety_identifier: str | None = None
    service_tier: str | None = None
    prompt_cache_key: str | None = None


class SamplingFields(AccountFields):
    """What chat and completions have in common. None means: not given, so the model's own default."""

    model: str | None = None
    stream: bool = False
    stream_options: StreamOptions | None = None
    n: Annotated[int, Field(ge=1, le=MAX_N)] | None = None
    temperature: Temperature | None = None
    top_p: Probability | None = None
    top_k: TopK | None = None
    min_p: Probability | None = None
    repetition_penalty: Annotated[float, Field(gt=0.0, le=100.0)] | None = None
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    logit_bias: Annotated[dict[str, float], Field(max_length=MAX_LOGIT_BIAS)] | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    stop: str | list[str] | None = None
    stop_token_ids: list[int] | None = None
    include_stop_str_in_output: bool | None = None
    ignore_eos: bool | None = None
    min_tokens: Annotated[int, Field(ge=0, lt=2**31)] | None = None
    max_tokens: Count | None = None
    skip_special_tokens: bool | None = None
    prompt_logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None
    priority: Priority = 0
    cache_salt: CacheSalt = ""
    response_format: ResponseFormat | None = None
    structured_outputs: StructuredFields | None = None
    guided_json: str | dict[str, Any] | None = None
    guided_regex: str | None = None
    guided_choice: list[str] | None = None
    guided_grammar: str | None = None

    def sampling(self, defaults: dict[str, Any], **changes: Any) -> SamplingParams:
        """``defaults`` are the model's; a field of the request goes before. Raises BadRequest."""
        values = dict(defaults)
        for name in SamplingParams.__struct_fields__:
            given = getattr(self, name, None)
            if given is not None and name not in ("logprobs", "logit_bias", "structured_outputs"):
                values[name] = given
        if self.logit_bias is not None:
            values["logit_bias"] = _token_keys(self.logit_bias)
        values.update(changes)
        return SamplingParams(**values)

    def structured(self) -> StructuredOutputs | None:
        """The one form that the answer must have. Raises BadRequest where two were asked for."""
        forms: dict[str, StructuredOutputs] = {}
        if self.response_format is not None and self.response_format.type != "text":
            forms["response_format"] = _of_format(self.response_format)
        if self.structured_outputs is not None:
            forms["structured_outputs"] = StructuredOutputs(**self.structured_outputs.model_dump(by_alias=True))
        for name in ("json", "regex", "choice", "grammar"):
            value = getattr(self, f"guided_{name}")
            if value is not None:
                forms[f"guided_{name}"] = StructuredOutputs(**{name: value})
        if len(forms) > 1:
            raise BadRequest(f"{' and '.join(forms)} cannot be combined: give one of them", list(forms)[1])
        return next(iter(forms.values()), None)


class ChatMessage(FailFastModel, extra="allow", strict=True, allow_inf_nan=False):
    """Templates look at more keys than any list could name, so unknown ones pass through to them."""

    role: Annotated[str, Field(min_length=1, max_length=64)]
    content: str | list[dict[str, Any]] | None = None

    def for_template(self) -> dict[str, Any]:
        values = self.model_dump(exclude_none=True)
        values["content"] = _plain_content(self.content)
        if values["role"] == "developer":
            values["role"] = "system"
        if "reasoning" in values and "reasoning_content" not in values:
            values["reasoning_content"] = values.pop("reasoning")
        if "tool_calls" in values:
            values["tool_calls"] = _calls_for_template(values["tool_calls"])
        return values


class Function(Body):
    name: Annotated[str, Field(pattern=r"^[a-zA-Z0-9_.:-]{1,128}$")]
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(Body):
    type: Literal["function"]
    function: Function

    def for_template(self) -> dict[str, Any]:
        return self.model_dump(exclude_none=True)


class NamedFunction(Body):
    name: str


class NamedTool(Body):
    type: Literal["function"]
    function: NamedFunction


class ChatRequest(SamplingFields):
    messages: Annotated[list[ChatMessage], Field(min_length=1)]
    max_completion_tokens: Count | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None
    add_generation_prompt: bool = True
    chat_template_kwargs: dict[str, Any] | None = None
    tools: Annotated[list[Tool], Field(max_length=MAX_TOOLS)] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedTool | None = None
    parallel_tool_calls: bool | None = None
    enable_thinking: bool | None = None
    reasoning_effort: Effort | None = None
    thinking_budget: Annotated[int, Field(ge=0, lt=2**31)] | None = None
    loop_recovery: bool = True

    @classmethod
    def of(cls, **fields: Any) -> ChatRequest:
        """From another API's words; None means not given. Raises BadRequest."""
        try:
            return cls.model_validate({name: value for name, value in fields.items() if value is not None})
        except ValidationError as error:
            raise _refusal(error) from None


class CompletionRequest(SamplingFields):
    prompt: str | list[int] | list[str] | list[list[int]]  # ids first: a kind tried before costs an error for each
    suffix: str | None = None
    echo: bool = False
    best_of: Annotated[int, Field(ge=1, le=MAX_N)] | None = None
    logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None
    add_special_tokens: bool = True


class EmbeddingRequest(Body):
    """Token ids are used as they are; texts are closed as the tokenizer's post-processor says."""

    model: str | None = None
    input: str | list[int] | list[str] | list[list[int]]
    encoding_format: Literal["float", "base64"] = "float"
    dimensions: Annotated[int, Field(ge=1, lt=2**31)] | None = None
    add_special_tokens: bool = True
    priority: Priority = 0
    cache_salt: CacheSalt = ""
    user: str | None = None


class TokenizeRequest(Body):
    model: str | None = None
    prompt: str | None = None
    messages: Annotated[list[ChatMessage], Field(min_length=1)] | None = None
    tools: list[Tool] | None = None
    add_special_tokens: bool = True
    add_generation_prompt: bool = True
    chat_template_kwargs: dict[str, Any] | None = None


class DetokenizeRequest(Body):
    model: str | None = None
    tokens: list[Annotated[int, Field(ge=0, lt=2**31)]]


def as_list(given: str | list[str] | list[int] | list[list[int]]) -> list[str | list[int]]:
    """Texts or lists of token ids, where one of them need not be in a list."""
    if isinstance(given, str) or (given and isinstance(given[0], int)):
        return [given]
    return list(given)  # type: ignore[arg-type]


def parse(kind: type[B], body: bytes | bytearray) -> B:
    """Raises BadRequest that names the first wrong field."""
    try:
        found = kind.model_validate_json(body)
    except ValidationError as error:
        raise _refusal(error) from None
    _check_numbers(found)
    return found


def _refusal(error: ValidationError) -> BadRequest:
    first = error.errors(include_url=False, include_input=False, include_context=False)[0]
    place = [part for part in first["loc"] if not _is_union_label(part)]
    where = ".".join(str(part) for part in place)[:200]
    if first["type"] == "extra_forbidden":
        return BadRequest(f"unknown field {where!r}: it is not supported by this server", where)
    return BadRequest(f"{where}: {first['msg']}" if where else first["msg"], where or None)


def _check_numbers(value: Any) -> None:
    """Fields without a type of their own, such as schemas, may hold numbers that nothing behind them can write."""
    if isinstance(value, BaseModel):
        value = {**value.__dict__, **(value.model_extra or {})}
    if isinstance(value, float) and not math.isfinite(value):
        raise BadRequest("the request body contains NaN or an infinite number, which JSON does not have")
    if isinstance(value, int) and not -(2**63) <= value < 2**64:
        raise BadRequest("the request body contains a whole number of more than 64 bits")
    if isinstance(value, list) and set(map(type, value)) <= PLAIN:
        value = _extremes(value)
    if isinstance(value, (dict, list)):
        for item in value.values() if isinstance(value, dict) else value:
            if not isinstance(item, str):
                _check_numbers(item)


def _extremes(values: list[Any]) -> list[Any]:
    """Of a long list of numbers, such as a prompt's ids, those that speak for all."""
    whole = [one for one in values if type(one) is int]
    strange = [one for one in values if type(one) is float and not math.isfinite(one)]
    return [*strange[:1], *([min(whole), max(whole)] if whole else [])]


def _is_union_label(part: int | str) -> bool:
    """pydantic puts the name of the union's branch into the place of an error; it is not a field."""
    return isinstance(part, str) and (
        part in ("str", "int", "float", "bool", "NamedTool") or part.startswith(("list[", "dict[", "literal["))
    )


def _token_keys(bias: dict[str, float]) -> dict[int, float]:
    if not all(key.isascii() and key.isdigit() and len(key) <= 10 for key in bias):
        raise BadRequest("the keys of logit_bias must be token ids", "logit_bias")
    return {int(key): value for key, value in bias.items()}


def _of_format(asked: ResponseFormat) -> StructuredOutputs:
    if asked.type == "json_object":
        return StructuredOutputs(json_object=True)
    if asked.json_schema is None or asked.json_schema.schema_ is None:
        raise BadRequest("response_format of type json_schema needs json_schema.schema", "response_format")
    return StructuredOutputs(json=asked.json_schema.schema_)


def _plain_content(content: str | list[dict[str, Any]] | None) -> str:
    if content is None or isinstance(content, str):
        return content or ""
    parts = []
    for part in content:
        if part.get("type") not in ("text", "input_text", "output_text") or not isinstance(part.get("text"), str):
            raise BadRequest(f"content part of type {part.get('type')!r}: this model reads text only", "messages")
        parts.append(part["text"])
    return "".join(parts)


def _calls_for_template(calls: Any) -> list[dict[str, Any]]:
    """Templates want the arguments as an object; OpenAI's clients send them as text."""
    found = []
    for call in calls if isinstance(calls, list) else [None]:
        function = call.get("function") if isinstance(call, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise BadRequest("each of a message's tool_calls needs function.name", "messages")
        arguments = function.get("arguments") or {}
        if isinstance(arguments, str):
            try:
                arguments = loads(arguments)
            except StrictJsonError as error:
                raise BadRequest(f"the arguments of tool call {function['name']!r}: {error}", "messages") from None
        found.append({**(call or {}), "function": {**function, "arguments": arguments}})
    return found
