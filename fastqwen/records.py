"""The records that cross rooms. Each is complete at birth, and msgspec can encode each one.

EngineRequest   client    -> scheduler   one sequence to generate
ScheduledBatch  scheduler -> runner      which slots advance by how many tokens
StepOutput      runner    -> commit      what was sampled
RequestDelta    commit    -> client      what one request gained in one step
Sampling        rides inside EngineRequest and Admission

Those of which a step makes hundreds are kept out of sight of Python's garbage collector (gc=False): plain data cannot form
cycles, and else a step of 256 rows would set a collection off.
"""

from __future__ import annotations

from typing import Any, Literal

import msgspec

from fastqwen.errors import BadRequest

FinishReason = Literal["stop", "length", "tool_calls", "abort", "error"]
FailureKind = Literal["grammar", "not_finite", "sampling", "gone", "closed"]
Pooling = Literal["last", "all"]
PoolingTask = Literal["embed", "classify", "token_embed", "token_classify"]
POOLING_TASKS = ("embed", "classify", "token_embed", "token_classify")

MAX_STOP_STRINGS = 16
MAX_STOP_CHARS = 1024
MAX_LOGPROBS = 20
MAX_LOGIT_BIAS = 1024
MAX_N = 128
MAX_BAD_WORDS = 256
MAX_LOGPROB_TOKEN_IDS = 128
ALL = -1  # of log-probabilities: the whole vocabulary's
MAX_GRAMMAR_CHARS = 200_000


class StructuredOutputs(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Exactly one form that an answer must have. ``json`` is a JSON schema, ``grammar`` is Lark or GBNF."""

    json: str | dict[str, Any] | bool | None = None
    regex: str | None = None
    choice: list[str] | None = None
    grammar: str | None = None
    json_object: bool | None = None

    def __post_init__(self) -> None:
        given = [name for name in self.__struct_fields__ if getattr(self, name) is not None]
        if len(given) != 1 or self.json_object is False:
            raise BadRequest(
                "structured_outputs needs exactly one of json, regex, choice, grammar, json_object",
                "structured_outputs",
            )

    @classmethod
    def of(cls, given: dict[str, Any]) -> StructuredOutputs:
        """From a dict, whose null fields are not given. Raises BadRequest."""
        unknown = sorted(str(name) for name in given.keys() - set(cls.__struct_fields__) if given[name] is not None)
        if unknown:
            raise BadRequest(f"structured_outputs has no {unknown[0]!r}", "structured_outputs")
        return cls(**{name: value for name, value in given.items() if value is not None})


class Grammar(msgspec.Struct, frozen=True):
    """llguidance's text, and the text after which it begins to hold ("": at once)."""

    text: str
    after: str = ""


class Sampling(msgspec.Struct, kw_only=True, omit_defaults=True):
    """How the engine chooses a token and what it tells of the choice. Checked where it was made: by SamplingParams."""

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: dict[int, float] | None = None
    allowed_token_ids: list[int] | None = None  # no other token is ever chosen
    bad_word_ids: list[list[int]] = []  # an answer never holds one of these sequences
    min_tokens: int = 0
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    logprob_token_ids: list[int] | None = None  # whose log-probabilities are told, in place of the likeliest tokens'

    @property
    def greedy(self) -> bool:
        return self.temperature < GREEDY_BELOW

    @property
    def needs_history(self) -> bool:
        """Whether the next token's distribution depends on which tokens came before."""
        return self.repetition_penalty != 1.0 or self.presence_penalty != 0.0 or self.frequency_penalty != 0.0

    def needs_more(self, num_generated: int) -> bool:
        """Whether temperature and cuts alone do not say how the token behind so many is chosen and told."""
        return (
            self.needs_history
            or self.logit_bias is not None
            or self.logprobs is not None
            or self.allowed_token_ids is not None
            or bool(self.bad_word_ids)
            or num_generated < self.min_tokens
        )


class SamplingParams(Sampling, kw_only=True, omit_defaults=True):
    """What a caller asks of an answer, under the names that vLLM's users know.

    temperature 0 is greedy. ``top_k`` of 0 or -1 means no limit. ``max_tokens`` of None means up to the model's
    length. ``logprobs`` and ``prompt_logprobs`` of -1 are the whole vocabulary's. ``bad_words`` are texts that an answer must
    not hold, with or without a space before them. ``logprob_token_ids`` are told of at each token of the answer, in place of the
    likeliest. ``truncate_prompt_tokens`` keeps a prompt's last tokens, as many as that;
    -1: as many as the context takes. ``thinking_token_budget`` is how many tokens may lie between <think> and </think>; -1 or None:
    no limit, and none under ``structured_outputs``, which hold from the first token. Raises BadRequest, naming the field, for a
    value out of range.
    """

    n: int = 1
    seed: int | None = None
    stop: list[str] | str = []
    stop_token_ids: list[int] = []
    ignore_eos: bool = False
    max_tokens: int | None = 16
    include_stop_str_in_output: bool = False
    skip_special_tokens: bool = True
    detokenize: bool = True
    structured_outputs: StructuredOutputs | None = None
    bad_words: list[str] = []
    truncate_prompt_tokens: int | None = None
    thinking_token_budget: int | None = None

    def __post_init__(self) -> None:
        for name in ("stop", "stop_token_ids", "bad_words"):
            if getattr(self, name) is None:
                setattr(self, name, [])
        if isinstance(self.stop, str):
            self.stop = [self.stop]
        if isinstance(self.structured_outputs, dict):
            self.structured_outputs = StructuredOutputs.of(self.structured_outputs)
        self.check()

    @property
    def stop_strings(self) -> list[str]:
        return [self.stop] if isinstance(self.stop, str) else self.stop

    @property
    def for_engine(self) -> Sampling:
        return Sampling(**{name: getattr(self, name) for name in Sampling.__struct_fields__})

    def check(self) -> None:
        """Raises BadRequest. Fields can be set one by one, so this is asked again before a request is made of them."""
        _within("n", self.n, 1, MAX_N)
        _within("temperature", self.temperature, 0.0, 100.0)
        _within("top_k", self.top_k, -1, 2**31 - 1)
        _within("top_p", self.top_p, 0.0, 1.0, open_low=True)
        _within("min_p", self.min_p, 0.0, 1.0)
        _within("repetition_penalty", self.repetition_penalty, 0.0, 100.0, open_low=True)
        _within("presence_penalty", self.presence_penalty, -2.0, 2.0)
        _within("frequency_penalty", self.frequency_penalty, -2.0, 2.0)
        _within("min_tokens", self.min_tokens, 0, 2**31 - 1)
        if self.seed is not None:
            _within("seed", self.seed, -(2**63), 2**63 - 1)
        if self.max_tokens is not None:
            _within("max_tokens", self.max_tokens, 1, 2**31 - 1)
            if self.min_tokens > self.max_tokens:
                raise BadRequest(
                    f"min_tokens is {self.min_tokens}, which is more than max_tokens ({self.max_tokens})", "min_tokens"
                )
        for name in ("logprobs", "prompt_logprobs"):
            value = getattr(self, name)
            if value is not None:
                _within(name, value, ALL, 2**31 - 1)
        if self.truncate_prompt_tokens is not None:
            _within("truncate_prompt_tokens", self.truncate_prompt_tokens, ALL, 2**31 - 1)
            if self.truncate_prompt_tokens == 0:
                raise BadRequest("truncate_prompt_tokens is 0, which leaves nothing", "truncate_prompt_tokens")
        if self.thinking_token_budget is not None:
            if isinstance(self.thinking_token_budget, (bool, float)):
                raise BadRequest("thinking_token_budget must be a whole number", "thinking_token_budget")
            _within("thinking_token_budget", self.thinking_token_budget, ALL, 2**31 - 1)
            if not self.detokenize:
                raise BadRequest(
                    "thinking_token_budget needs detokenize: thinking is found in the text", "thinking_token_budget"
                )
        self._check_lists()
        self._check_forbidden()

    def _check_lists(self) -> None:
        if len(self.stop_strings) > MAX_STOP_STRINGS:
            raise BadRequest(
                f"stop has {len(self.stop_strings)} strings, at most {MAX_STOP_STRINGS} are allowed", "stop"
            )
        for text in self.stop_strings:
            if not 1 <= len(text) <= MAX_STOP_CHARS:
                raise BadRequest(f"each stop string must have 1 to {MAX_STOP_CHARS} characters", "stop")
        if len(self.stop_token_ids) > MAX_STOP_STRINGS * 4:
            raise BadRequest(f"stop_token_ids allows at most {MAX_STOP_STRINGS * 4} ids", "stop_token_ids")
        if self.logit_bias is not None:
            if len(self.logit_bias) > MAX_LOGIT_BIAS:
                raise BadRequest(f"logit_bias allows at most {MAX_LOGIT_BIAS} entries", "logit_bias")
            for bias in self.logit_bias.values():
                _within("logit_bias", bias, -100.0, 100.0)

    def _check_forbidden(self) -> None:
        if self.logprob_token_ids is not None and len(self.logprob_token_ids) > MAX_LOGPROB_TOKEN_IDS:
            raise BadRequest(
                f"logprob_token_ids has {len(self.logprob_token_ids)} ids, at most {MAX_LOGPROB_TOKEN_IDS} are allowed: ask for "
                "logprobs=-1, which tells of all tokens",
                "logprob_token_ids",
            )
        if self.allowed_token_ids is not None and not self.allowed_token_ids:
            raise BadRequest("allowed_token_ids is empty, so no token could be chosen", "allowed_token_ids")
        for name in ("bad_words", "bad_word_ids"):
            listed = getattr(self, name)
            if len(listed) > MAX_BAD_WORDS:
                raise BadRequest(f"{name} has {len(listed)} entries, at most {MAX_BAD_WORDS} are allowed", name)
            if any(not one for one in listed):
                raise BadRequest(f"{name}: an empty word is in every answer", name)
            if any(len(one) > MAX_STOP_CHARS for one in listed):
                raise BadRequest(f"{name}: each may be at most {MAX_STOP_CHARS} long", name)


class PoolingParams(msgspec.Struct):
    """What a caller asks of a vector or of a classifier, under the names, and in the order, that vLLM's users know.

    ``use_activation``: whether a vector is brought to length 1, and a classifier's numbers made probabilities; None: yes.
    ``normalize``, ``activation`` and ``softmax`` are older names of it. Raises BadRequest for what cannot be had.
    """

    use_activation: bool | None = None
    dimensions: int | None = None
    step_tag_id: int | None = None
    returned_token_ids: list[int] | None = None
    task: str | None = None
    truncate_prompt_tokens: int | None = None
    normalize: bool | None = None
    activation: bool | None = None
    softmax: bool | None = None

    def __post_init__(self) -> None:
        if self.task not in (None, "score", *POOLING_TASKS):
            raise BadRequest(f"task {self.task!r}: there are {', '.join(POOLING_TASKS)}", "task")
        for name in ("step_tag_id", "returned_token_ids"):
            if getattr(self, name) is not None:
                raise BadRequest(
                    f"{name} is for models that judge each step: pick from what token_classify gives", name
                )
        names = ("use_activation", "normalize", "activation", "softmax")
        given = {name: getattr(self, name) for name in names if getattr(self, name) is not None}
        if len(set(given.values())) > 1:
            raise BadRequest(f"{' and '.join(given)} contradict each other: give use_activation alone", list(given)[-1])
        self.use_activation = next(iter(given.values()), None)
        self.normalize = self.activation = self.softmax = None

    @property
    def activated(self) -> bool:
        return self.use_activation is not False


GREEDY_BELOW = 1e-5  # as in vLLM: dividing by less than this would only overflow


LEAST_SINGLE = 2.0**-126  # less than this is 0 to a device that works in single precision and keeps no denormals


def _within(name: str, value: float, low: float, high: float, *, open_low: bool = False) -> None:
    """Numbers are stored in single precision: one that is not 0 here must not become 0 there where 0 is not allowed."""
    inside = (low < value if open_low else low <= value) and value <= high  # NaN fails both comparisons
    if inside and open_low and value < LEAST_SINGLE:
        raise BadRequest(f"{name} is {value}, which is 0 in single precision: it must be at least 1.2e-38", name)
    if not inside:
        edge = "greater than" if open_low else "at least"
        raise BadRequest(f"{name} is {value}, but must be {edge} {low:g} and at most {high:g}", name)


class EngineRequest(msgspec.Struct, kw_only=True, frozen=True, gc=False):
    """One sequence to generate. ``n`` > 1 was unfolded by the client; stop strings stay with the client as well."""

    request_id: str
    prompt_token_ids: list[int]
    sampling: Sampling
    stop_token_ids: list[int]  # derived end-of-turn ids and the request's own, already joined
    max_tokens: int  # within the context
    seed: int  # always set, so that a replay gives the same tokens
    is_open_ended: bool = False  # the caller set no limit: max_tokens is what the context leaves
    priority: int = 0  # smaller runs first
    cache_salt: str = ""
    grammar: Grammar | None = None
    # It ends with vectors instead of tokens: with the prompt's last token's, or with one of each of its tokens.
    pooling: Pooling | None = None
    arrival_s: float = 0.0
    # What another engine generated of the answer before it was lost. It counts as generated here: by max_tokens, min_tokens,
    # penalties, grammar and random numbers; deltas bring only what comes behind it.
    said_token_ids: list[int] = []


class Admission(msgspec.Struct, kw_only=True, frozen=True):
    """A sequence takes a slot: everything that the runner must know about it until it leaves."""

    slot: int
    request_id: str
    token_ids: list[int]  # prompt and, after a preemption, what was generated before
    num_prompt_tokens: int
    sampling: Sampling
    seed: int
    stop_token_ids: list[int]
    rope_key: str  # names the rotary profile; the model knows what it means
    grammar: Grammar | None = None
    kept_state: int | None = None  # place of the copy with which its states of fixed size begin; None: with nothing


class Row(msgspec.Struct, kw_only=True, frozen=True, gc=False):
    """One sequence's share of a step: tokens [start, start + num_tokens) are computed."""

    slot: int
    request_id: str
    start: int
    num_tokens: int
    new_blocks: tuple[int, ...]  # appended to the slot's block table before the step
    num_logits: int  # of the last tokens, each of whose logits give a token; 0: the row only fills the cache
    prompt_logprobs: bool = False
    pools: bool = False  # the last token's hidden state is the request's result; such a row has no logits
    pools_all: bool = False  # each of its tokens' is a part of the request's result
    repeats: bool = False  # its one token was computed before: states of fixed size hold it already
    keep_state: int | None = None  # place for a copy of its states of fixed size after the step; None: no copy

    @property
    def end(self) -> int:
        return self.start + self.num_tokens


class ScheduledBatch(msgspec.Struct, kw_only=True, frozen=True):
    """A step. Rows stand by their kind, for each of which there are kernels: first those of one token, then those that go
    on behind a cached part, then fresh ones, which begin their sequence; among the first the longest contexts, and
    among the others equal lengths side by side."""

    step_id: int
    admissions: list[Admission]
    rows: list[Row]

    @property
    def num_tokens(self) -> int:
        return sum(row.num_tokens for row in self.rows)


class TokenLogprobs(msgspec.Struct, frozen=True, gc=False):
    """The chosen token's log-probability, its rank (1 is the most likely), and the top alternatives, or those asked for."""

    token_id: int
    logprob: float
    rank: int
    top_ids: list[int]
    top_logprobs: list[float]
    top_ranks: list[int] | None = None  # None: 1, 2, ...


class Failure(msgspec.Struct, frozen=True, gc=False):
    """Why a request ended without its answer: the kind is for programs, the message for people.

    grammar: the request's own grammar cannot be used. not_finite: the model's numbers broke. sampling: choosing this
    request's token failed, which is our bug. gone: the engine ended while the request was running. closed: the engine was
    shut down, or its user closed it.
    """

    kind: FailureKind
    message: str


class SampledRow(msgspec.Struct, kw_only=True, frozen=True, gc=False):
    """``token_ids`` are those that hold, at most the row's num_logits: what was computed behind them is taken back."""

    request_id: str
    token_ids: list[int] = []
    logprobs: list[TokenLogprobs] | None = None  # one for each of token_ids
    prompt_logprobs: list[TokenLogprobs] | None = None  # for the prompt tokens that this step scored
    embedding: bytes | None = (
        None  # float32, little-endian: as the model makes it, of any length; or a label's number each; of one token or several
    )
    error: Failure | None = None
    stepped_aside: bool = False  # it has no token: StepHandle.late held its request


class StepOutput(msgspec.Struct, kw_only=True, frozen=True):
    step_id: int
    rows: list[SampledRow]


class RequestDelta(msgspec.Struct, kw_only=True, frozen=True, gc=False):
    """What one request gained. Exactly one delta of each request carries a finish_reason, and it is the last."""

    request_id: str
    token_ids: list[int] = []
    logprobs: list[TokenLogprobs] | None = None
    prompt_logprobs: list[TokenLogprobs] | None = None
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None
    error: Failure | None = None
    num_cached_tokens: int = 0
    waited_s: float = 0.0  # for other requests, before the first step that served it; with the first token
    num_preemptions: int = 0  # how often it had to begin again, so far
    embedding: bytes | None = None  # as in SampledRow; comes with the finish_reason
