"""What requests hold, field by field (``body.py`` reads them)."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, ValidationError

from fastqwen.errors import BadRequest
from fastqwen.records import (
    MAX_BAD_WORDS,
    MAX_LOGIT_BIAS,
    MAX_LOGPROB_TOKEN_IDS,
    MAX_N,
    SamplingParams,
    StructuredOutputs,
)
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
    Truncation,
    Whole,
    refusal,
    whole_ids,
)
from fastqwen.server.dialects.fail_fast import FailFastModel
from fastqwen.server.dialects.warnings import Warnings

MAX_TOOLS = 1024
# vLLM's word, which ends thinking with nothing but its last mark; -1: no limit.
TokenBudget = Annotated[Whole, Field(ge=-1, lt=2**31)]
SMALLEST_TOP_P = 1e-6  # documented ranges begin at 0, which no set of tokens can have: the likeliest token alone


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

    @property
    def is_skipped(self) -> bool:
        return not self.is_function


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
    thinking_token_budget: TokenBudget | None = None
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
            raise refusal(error) from None
        found.warnings.include(warnings)
        return found


class CompletionRequest(SamplingFields):
    # ids first: a kind tried before costs an error for each
    prompt: Annotated[str | list[int] | list[str] | list[list[int]], BeforeValidator(whole_ids)]
    suffix: str | None = None
    echo: bool = False
    best_of: Annotated[Whole, Field(ge=0, le=MAX_N)] | None = None
    thinking_token_budget: TokenBudget | None = None
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
