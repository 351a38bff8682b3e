"""Request bodies. Every field acts, or is listed in ``WITHOUT_EFFECT`` and answered with a warning; others are refused."""

from __future__ import annotations

from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from fastqwen.errors import BadRequest
from fastqwen.records import MAX_LOGPROBS, MAX_N, SamplingParams

# Fields that OpenAI's clients send and that have no meaning on a server of one's own.
WITHOUT_EFFECT = frozenset({"user", "metadata", "store", "safety_identifier", "service_tier", "prompt_cache_key"})

Probability = Annotated[float, Field(ge=0.0, le=1.0)]
Penalty = Annotated[float, Field(ge=-2.0, le=2.0)]


B = TypeVar("B", bound=BaseModel)


class Body(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


class StreamOptions(Body):
    include_usage: bool = False
    continuous_usage_stats: bool = False


class SamplingFields(Body):
    """What chat and completions have in common. None means: not given, so the model's own default."""

    model: str | None = None
    stream: bool = False
    stream_options: StreamOptions | None = None
    n: Annotated[int, Field(ge=1, le=MAX_N)] | None = None
    temperature: Annotated[float, Field(ge=0.0, le=100.0)] | None = None
    top_p: Probability | None = None
    top_k: Annotated[int, Field(ge=-1, lt=2**31)] | None = None
    min_p: Probability | None = None
    repetition_penalty: Annotated[float, Field(gt=0.0, le=100.0)] | None = None
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    logit_bias: dict[str, float] | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    stop: str | list[str] | None = None
    stop_token_ids: list[int] | None = None
    include_stop_str_in_output: bool | None = None
    ignore_eos: bool | None = None
    min_tokens: Annotated[int, Field(ge=0, lt=2**31)] | None = None
    max_tokens: Annotated[int, Field(ge=1, lt=2**31)] | None = None
    skip_special_tokens: bool | None = None
    prompt_logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None
    priority: Annotated[int, Field(ge=-(2**31), lt=2**31)] = 0
    cache_salt: Annotated[str, Field(max_length=256)] = ""
    user: str | None = None
    metadata: dict[str, Any] | None = None
    store: bool | None = None
    safety_identifier: str | None = None
    service_tier: str | None = None
    prompt_cache_key: str | None = None

    def sampling(self, defaults: dict[str, Any], **changes: Any) -> SamplingParams:
        """``defaults`` are the model's; a field of the request goes before. Raises BadRequest."""
        values = dict(defaults)
        for name in SamplingParams.__struct_fields__:
            given = getattr(self, name, None)
            if given is not None and name not in ("logprobs", "logit_bias"):
                values[name] = given
        if self.logit_bias is not None:
            values["logit_bias"] = _token_keys(self.logit_bias)
        values.update(changes)
        return SamplingParams(**values)

    def warnings(self) -> list[str]:
        given = sorted(name for name in WITHOUT_EFFECT if getattr(self, name, None) is not None)
        return [f"{name} has no effect on this server" for name in given]


class ChatMessage(BaseModel):
    """Templates look at more keys than any list could name, so unknown ones pass through to them."""

    model_config = ConfigDict(extra="allow", strict=True, allow_inf_nan=False)

    role: Annotated[str, Field(min_length=1, max_length=64)]
    content: str | list[dict[str, Any]] | None = None

    def for_template(self) -> dict[str, Any]:
        values = self.model_dump(exclude_none=True)
        values["content"] = _plain_content(self.content)
        return values


class ChatRequest(SamplingFields):
    messages: Annotated[list[ChatMessage], Field(min_length=1)]
    max_completion_tokens: Annotated[int, Field(ge=1, lt=2**31)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None
    add_generation_prompt: bool = True
    chat_template_kwargs: dict[str, Any] | None = None


class CompletionRequest(SamplingFields):
    prompt: str | list[str] | list[int] | list[list[int]]
    echo: bool = False
    logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None
    add_special_tokens: bool = True


class TokenizeRequest(Body):
    model: str | None = None
    prompt: str | None = None
    messages: Annotated[list[ChatMessage], Field(min_length=1)] | None = None
    add_special_tokens: bool = True
    add_generation_prompt: bool = True
    chat_template_kwargs: dict[str, Any] | None = None


class DetokenizeRequest(Body):
    model: str | None = None
    tokens: list[Annotated[int, Field(ge=0, lt=2**31)]]


def parse(kind: type[B], body: bytes) -> B:
    """Raises BadRequest that names the first wrong field."""
    try:
        return kind.model_validate_json(body)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False, include_context=False)[0]
        place = [part for part in first["loc"] if not _is_union_label(part)]
        where = ".".join(str(part) for part in place)
        if first["type"] == "extra_forbidden":
            raise BadRequest(f"unknown field {where!r}: it is not supported by this server", where) from None
        raise BadRequest(f"{where}: {first['msg']}" if where else first["msg"], where or None) from None


def _is_union_label(part: int | str) -> bool:
    """pydantic puts the name of the union's branch into the place of an error; it is not a field."""
    return isinstance(part, str) and (part in ("str", "int", "float", "bool") or part.startswith(("list[", "dict[")))


def _token_keys(bias: dict[str, float]) -> dict[int, float]:
    if not all(key.isascii() and key.isdigit() and len(key) <= 10 for key in bias):
        raise BadRequest("the keys of logit_bias must be token ids", "logit_bias")
    return {int(key): value for key, value in bias.items()}


def _plain_content(content: str | list[dict[str, Any]] | None) -> str:
    if content is None:
        return ""
    if isinstance(content, str):
        return content
    parts = []
    for part in content:
        if part.get("type") != "text" or not isinstance(part.get("text"), str):
            raise BadRequest(f"content part of type {part.get('type')!r}: this model reads text only", "messages")
        parts.append(part["text"])
    return "".join(parts)
