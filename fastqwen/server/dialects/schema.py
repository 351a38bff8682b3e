"""Request bodies. Every field acts, or is answered with a warning: those in ``WITHOUT_EFFECT``, and those that nobody knows.

Refused by name is what would change the meaning of the answer (``CHANGES_THE_ANSWER``), and with --strict-fields whatever is
not known.
"""

from __future__ import annotations

import math
import re
from codecs import BOM_UTF8
from collections.abc import Iterator
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, BeforeValidator, Field, PrivateAttr, ValidationError, model_validator

from fastqwen.errors import BadRequest
from fastqwen.records import (
    ALL,
    MAX_BAD_WORDS,
    MAX_LOGIT_BIAS,
    MAX_LOGPROB_TOKEN_IDS,
    MAX_N,
    SamplingParams,
    StructuredOutputs,
)
from fastqwen.server.dialects import spellings
from fastqwen.server.dialects.fail_fast import FailFastModel
from fastqwen.server.dialects.warnings import Warnings
from fastqwen.text.strict_json import StrictJsonError, loads

# What has no meaning on a server of one's own.
WITHOUT_EFFECT = frozenset({"user", "metadata", "store", "safety_identifier", "service_tier", "prompt_cache_key"})
PLAIN = frozenset({int, float, bool, type(None)})
# Fields of other servers and older APIs that cannot be had here and without which the answer would be another one: the
# values that mean nothing, and what to do instead of the others.
CHANGES_THE_ANSWER: dict[str, tuple[tuple[Any, ...], str]] = {
    "functions": (([],), "send tools"),
    "function_call": (("none", "auto"), "send tool_choice"),
    "audio": ((), "this model writes text only"),
    "modalities": (([], ["text"]), "this model writes text only"),
    "prompt_embeds": (([],), "send text or token ids"),
    "chat_template": ((), "it belongs to a chat's messages"),
    "grammar": (("",), "send structured_outputs"),
    "json_schema": (({},), "send response_format"),
    "truncate_prompt_tokens": ((), "shorten the prompt"),
    "documents": (([],), "they belong to a chat's messages"),
    "logits_processors": (([],), "send logit_bias, bad_words or allowed_token_ids"),
    "logprob_token_ids": (([],), "send it to /v1/chat/completions or /v1/completions"),
    "late_chunking_params": ((), "ask /pooling for task token_embed and take the means of your chunks"),
    "watermarking": ((False,), "no answer carries a mark"),
    "repetition_detection": ((), "send repetition_penalty or frequency_penalty"),
}
MAX_TOOLS = 1024
MAX_REPAIRED_BYTES = 8 * 2**20
MAX_REPAIRS = 10_000
# Escapes, so not behind an odd number of backslashes: halves of a pair without the other one.
HALF_HIGH = re.compile(rb"(?<!\\)((?:\\\\)*+)\\u[dD][89abAB][0-9a-fA-F]{2}(?!\\u[dD][c-fC-F][0-9a-fA-F]{2})")
HALF_LOW = re.compile(rb"(?<!\\)(?<!\\u[dD][89abAB][0-9a-fA-F]{2})((?:\\\\)*+)\\u[dD][c-fC-F][0-9a-fA-F]{2}")
SMALLEST_TOP_P = 1e-6  # documented ranges begin at 0, which no set of tokens can have: the likeliest token alone


def _whole(value: Any) -> Any:
    """JSON knows one kind of number: 64, 64.0 and 6.4e1 are the same."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


def whole_ids(value: Any) -> Any:
    """Of ids, or lists of them."""
    if not isinstance(value, list):
        return value
    kinds = set(map(type, value))
    if float in kinds:
        return [_whole(one) for one in value]
    return [whole_ids(one) for one in value] if list in kinds else value


Whole = Annotated[int, BeforeValidator(_whole)]
Probability = Annotated[float, Field(ge=0.0, le=1.0)]
Penalty = Annotated[float, Field(ge=-2.0, le=2.0)]
Temperature = Annotated[float, Field(ge=0.0, le=100.0)]
TopK = Annotated[Whole, Field(ge=-1, lt=2**31)]
Priority = Annotated[Whole, Field(ge=-(2**31), lt=2**31)]
CacheSalt = Annotated[str, Field(max_length=256)]
Count = Annotated[Whole, Field(ge=0, lt=2**31)]
Logprobs = Annotated[Whole, Field(ge=ALL, lt=2**31)]  # how many is the operator's to limit
Truncation = Annotated[Whole, Field(ge=ALL, lt=2**31)]
Seed = Annotated[Whole, Field(ge=-9223372036854776000, le=9223372036854776000)]  # OpenAI's range is that of a float

B = TypeVar("B", bound="Body")


class Body(FailFastModel, extra="allow", strict=True, allow_inf_nan=False):
    """An object of a request. What it does not know is kept in ``model_extra``."""

    _warnings: Warnings = PrivateAttr(default_factory=Warnings)
    _is_as_sent: bool = PrivateAttr(default=True)

    @model_validator(mode="before")
    @classmethod
    def _without_nulls(cls, given: Any) -> Any:
        """Clients send null for what they do not set."""
        return {name: value for name, value in given.items() if value is not None} if isinstance(given, dict) else given

    @property
    def warnings(self) -> Warnings:
        return self._warnings

    @property
    def is_as_sent(self) -> bool:
        """Whether the body can be read again as it came, at no more cost."""
        return self._is_as_sent

    def note(self, warnings: Warnings) -> None:
        """Those of whoever looked it through."""
        self._warnings = warnings

    def look_through(self, *, strict: bool) -> None:
        """List what has no effect. Raises BadRequest for what cannot be left out."""
        self._warnings = warnings = Warnings(strict=strict)
        for place, value in _unknown_fields(self):
            neutral, advice = CHANGES_THE_ANSWER.get(place, (None, ""))
            if neutral is None:
                warnings.unknown(place)
            elif not any(type(value) is type(one) and value == one for one in neutral):
                raise BadRequest(f"{place} is not supported by this server: {advice}", place)
        known = WITHOUT_EFFECT & type(self).model_fields.keys()
        for name in sorted(name for name in known if getattr(self, name) is not None):
            self._warnings.tell(f"{name} has no effect on this server")


def _unknown_fields(body: Body, where: str = "") -> Iterator[tuple[str, Any]]:
    """Places and values, also of the objects inside."""
    if isinstance(body, AnyTool) and not body.is_function:
        return
    for name, value in (body.model_extra or {}).items():
        yield where + name, value
    for name in type(body).model_fields:
        value = getattr(body, name)
        if isinstance(value, Body):
            yield from _unknown_fields(value, f"{where}{name}.")
        elif isinstance(value, list) and value and isinstance(value[0], Body):
            for index, one in enumerate(value):
                yield from _unknown_fields(one, f"{where}{name}.{index}.")


class StreamOptions(Body):
    include_usage: bool = False
    continuous_usage_stats: bool = False


class JsonSchemaFormat(Body):
    name: str | None = None
    description: str | None = None
    schema_: Annotated[dict[str, Any] | None, Field(alias="schema")] = None
    strict: bool | None = None


class ResponseFormat(Body):
    """``schema`` beside the type is other servers' spelling of json_schema."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchemaFormat | None = None
    schema_: Annotated[dict[str, Any] | None, Field(alias="schema")] = None


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
    n: Annotated[Whole, Field(ge=1, le=MAX_N)] | None = None
    temperature: Temperature | None = None
    top_p: Probability | None = None
    top_k: TopK | None = None
    min_p: Probability | None = None
    repetition_penalty: Annotated[float, Field(gt=0.0, le=100.0)] | None = None
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    logit_bias: Annotated[dict[str, float], Field(max_length=MAX_LOGIT_BIAS)] | None = None
    seed: Seed | None = None
    stop: str | list[str] | None = None
    stop_token_ids: list[Whole] | None = None
    include_stop_str_in_output: bool | None = None
    ignore_eos: bool | None = None
    min_tokens: Count | None = None
    max_tokens: Count | None = None
    skip_special_tokens: bool | None = None
    prompt_logprobs: Logprobs | None = None
    priority: Priority = 0
    cache_salt: CacheSalt = ""
    response_format: ResponseFormat | None = None
    structured_outputs: StructuredFields | None = None
    guided_json: str | dict[str, Any] | None = None
    guided_regex: str | None = None
    guided_choice: list[str] | None = None
    guided_grammar: str | None = None
    bad_words: Annotated[list[str], Field(max_length=MAX_BAD_WORDS)] | None = None
    allowed_token_ids: list[Whole] | None = None
    logprob_token_ids: Annotated[list[Whole], Field(max_length=MAX_LOGPROB_TOKEN_IDS)] | None = None
    truncate_prompt_tokens: Truncation | None = None
    truncation_side: Literal["left", "right"] = "left"
    use_beam_search: bool = False
    length_penalty: Annotated[float, Field(ge=-100.0, le=100.0)] = 1.0
    return_token_ids: bool = False
    return_tokens_as_token_ids: bool = False
    request_id: Annotated[str, Field(pattern=r"^[A-Za-z0-9_.:/+=@-]{1,128}$")] | None = None

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
        if values.get("seed") is not None:
            values["seed"] = (values["seed"] + 2**63) % 2**64 - 2**63
        if values.get("top_p") == 0:
            values["top_p"] = SMALLEST_TOP_P
        if values.get("max_tokens") == 0:
            values["max_tokens"] = 1  # which Generation keeps for itself
        return SamplingParams(**values)

    def structured(self) -> StructuredOutputs | None:
        """The one form that the answer must have. Raises BadRequest where two were asked for."""
        forms: dict[str, StructuredOutputs] = {}
        if self.response_format is not None and self.response_format.type != "text":
            forms["response_format"] = _of_format(self.response_format)
        if self.structured_outputs is not None:
            known = set(type(self.structured_outputs).model_fields)  # others are warned of
            given = self.structured_outputs.model_dump(by_alias=True, include=known)
            forms["structured_outputs"] = StructuredOutputs(**given)
        for name in ("json", "regex", "choice", "grammar"):
            value = getattr(self, f"guided_{name}")
            if value is not None:
                forms[f"guided_{name}"] = StructuredOutputs(**{name: value})
        if len(forms) > 1:
            raise BadRequest(f"{' and '.join(forms)} cannot be combined: give one of them", list(forms)[1])
        return next(iter(forms.values()), None)


class ChatMessage(FailFastModel, extra="allow", strict=True, allow_inf_nan=False):
    """Templates look at more keys than any list could name, so unknown ones pass through to them (``conversation.py``)."""

    role: Annotated[str, Field(min_length=1, max_length=64)]
    content: Annotated[str | list[str | dict[str, Any]] | None, BeforeValidator(spellings.content)] = None


class Function(Body):
    name: Annotated[str, Field(pattern=r"^[^\s<>\x00-\x1f]{1,256}$")]
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class AnyTool(Body):
    """Only functions can be called here; tools of other types are skipped with a warning, whatever they hold."""

    type: str = "function"

    @property
    def is_function(self) -> bool:
        return self.type == "function"


class Tool(AnyTool):
    function: Function | None = None

    def for_template(self) -> dict[str, Any]:
        assert self.function is not None
        known = {name: getattr(self.function, name) for name in Function.model_fields}
        function = {name: value for name, value in known.items() if value is not None}
        return {"type": "function", "function": function}


AnySpelling = Annotated[Tool, BeforeValidator(spellings.tool)]


class NamedFunction(Body):
    name: str


class AllowedTools(Body):
    mode: Literal["auto", "required"]
    tools: list[dict[str, Any]]


class ChosenTool(Body):
    """``function`` names the one to be called; ``allowed_tools`` are those of which one may be."""

    type: str
    function: NamedFunction | None = None
    allowed_tools: AllowedTools | None = None


class ChatFields(SamplingFields):
    """What may stand beside the messages of a chat."""

    max_completion_tokens: Count | None = None
    logprobs: bool | None = None
    top_logprobs: Logprobs | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool = False
    chat_template_kwargs: dict[str, Any] | None = None
    tools: Annotated[list[AnySpelling], Field(max_length=MAX_TOOLS)] | None = None
    tool_choice: Annotated[
        Literal["none", "auto", "required"] | ChosenTool | None, BeforeValidator(spellings.tool_choice)
    ] = None
    parallel_tool_calls: bool | None = None
    enable_thinking: bool | None = None
    reasoning_effort: str | None = None
    thinking_budget: Count | None = None
    thinking_token_budget: Count | None = None  # vLLM's name for it
    include_reasoning: bool | None = None
    loop_recovery: bool = True
    echo: bool = False
    return_prompt_text: bool = False
    chat_template: str | None = None
    documents: list[dict[str, Any]] | None = None


class ChatRequest(ChatFields):
    messages: Annotated[list[ChatMessage], Field(min_length=1)]

    @classmethod
    def of(cls, warnings: Warnings, **fields: Any) -> ChatRequest:
        """From another API's words; None means not given. ``warnings`` are that request's. Raises BadRequest."""
        try:
            found = cls.model_validate(fields)
        except ValidationError as error:
            raise _refusal(error) from None
        found.warnings.include(warnings)
        return found


class CompletionRequest(SamplingFields):
    # ids first: a kind tried before costs an error for each
    prompt: Annotated[str | list[int] | list[str] | list[list[int]], BeforeValidator(whole_ids)]
    suffix: str | None = None
    echo: bool = False
    best_of: Annotated[Whole, Field(ge=0, le=MAX_N)] | None = None
    logprobs: Logprobs | None = None
    add_special_tokens: bool = True


class TokenizeRequest(Body):
    model: str | None = None
    prompt: str | None = None
    messages: Annotated[list[ChatMessage], Field(min_length=1)] | None = None
    tools: list[AnySpelling] | None = None
    add_special_tokens: bool = True
    add_generation_prompt: bool | None = None
    continue_final_message: bool = False
    chat_template_kwargs: dict[str, Any] | None = None
    chat_template: str | None = None
    return_token_strs: bool = False


class DetokenizeRequest(Body):
    model: str | None = None
    tokens: Annotated[list[Annotated[int, Field(ge=0, lt=2**31)]], BeforeValidator(whole_ids)]


def as_list(given: str | list[str] | list[int] | list[list[int]]) -> list[str | list[int]]:
    """Texts or lists of token ids, where one of them need not be in a list."""
    if isinstance(given, str) or (given and isinstance(given[0], int)):
        return [given]
    return list(given)  # type: ignore[arg-type]


def parse(kind: type[B], body: bytes | bytearray, *, strict_fields: bool = False) -> B:
    """Raises BadRequest that names the first wrong field."""
    if body.startswith(BOM_UTF8):
        body = body[len(BOM_UTF8) :]
    try:
        return _parsed(kind, body, strict_fields)
    except ValidationError as error:
        repaired = _without_half_pairs(body) if error.errors(include_url=False)[0]["type"] == "json_invalid" else body
        if repaired == body:
            raise _refusal(error) from None
    try:
        found = _parsed(kind, repaired, strict_fields)
    except ValidationError as error:
        raise _refusal(error) from None
    found._is_as_sent = False
    found.warnings.tell("the body has half of a surrogate pair, which is no character: U+FFFD stands in its place")
    return found


def parse_checked(kind: type[B], body: bytes | bytearray, warnings: list[str], *, strict_fields: bool = False) -> B:
    """A body that was parsed and looked through before (``checking.py``), and what was said of it."""
    try:
        found = kind.model_validate_json(body[len(BOM_UTF8) :] if body.startswith(BOM_UTF8) else body)
    except ValidationError as error:
        raise _refusal(error) from None
    known = Warnings(strict=strict_fields)
    for warning in warnings:
        known.tell(warning)
    found.note(known)
    return found


def _parsed(kind: type[B], body: bytes | bytearray, strict_fields: bool) -> B:
    found = kind.model_validate_json(body)
    if not _all_finite(found):
        found = kind.model_validate(_exact(body))
        found._is_as_sent = False
    found.look_through(strict=strict_fields)
    return found


def _without_half_pairs(body: bytes | bytearray) -> bytes | bytearray:
    """Programs in JavaScript cut a text between the two escapes of an emoji, and from then on send that in every turn."""
    if len(body) > MAX_REPAIRED_BYTES:
        return body
    body, _ = HALF_HIGH.subn(rb"\1\\ufffd", body, MAX_REPAIRS)
    return HALF_LOW.sub(rb"\1\\ufffd", body, MAX_REPAIRS)


def _exact(body: bytes | bytearray) -> Any:
    """With numbers that no float can hold as what they are. Raises BadRequest for NaN, which is no JSON."""
    try:
        return loads(body.decode())
    except (StrictJsonError, UnicodeDecodeError) as error:
        raise BadRequest(f"the request body cannot be read: {error}") from None


def _refusal(error: ValidationError) -> BadRequest:
    first = error.errors(include_url=False, include_input=False, include_context=False)[0]
    place = [part for part in first["loc"] if not _is_union_label(part)]
    where = ".".join(str(part) for part in place)[:200]
    if first["type"] == "extra_forbidden":
        return BadRequest(f"unknown field {where!r}: it is not supported by this server", where)
    return BadRequest(f"{where}: {first['msg']}" if where else first["msg"], where or None)


def _all_finite(value: Any) -> bool:
    """Fields without a type of their own, such as schemas, may hold numbers that a float cannot."""
    if isinstance(value, BaseModel):
        value = {**value.__dict__, **(value.model_extra or {})}
    if isinstance(value, float):
        return math.isfinite(value)
    if isinstance(value, list) and set(map(type, value)) <= PLAIN:  # a prompt's ids, say
        return all(math.isfinite(one) for one in value if type(one) is float)
    if isinstance(value, (dict, list)):
        items = value.values() if isinstance(value, dict) else value
        return all(_all_finite(item) for item in items if not isinstance(item, str))
    return True


def _is_union_label(part: int | str) -> bool:
    """pydantic puts the name of the union's branch into the place of an error; it is not a field."""
    return isinstance(part, str) and (
        part in ("str", "int", "float", "bool", "ChosenTool")
        or part.startswith(("list[", "dict[", "literal[", "function-before["))
    )


def _token_keys(bias: dict[str, float]) -> dict[int, float]:
    wrong = [key for key in bias if not (key.isascii() and key.isdigit() and len(key) <= 10)]
    if wrong:
        named = ", ".join(key[:40] for key in wrong[:5])
        raise BadRequest(f"the keys of logit_bias must be token ids, which these are not: {named}", "logit_bias")
    return {int(key): value for key, value in bias.items()}


def _of_format(asked: ResponseFormat) -> StructuredOutputs:
    if asked.type == "json_object":
        return StructuredOutputs(json_object=True) if asked.schema_ is None else StructuredOutputs(json=asked.schema_)
    schema = asked.schema_ if asked.json_schema is None else asked.json_schema.schema_
    if schema is None:
        raise BadRequest("response_format of type json_schema needs json_schema.schema", "response_format")
    return StructuredOutputs(json=schema)
