"""SamplingParams with the fields that only vLLM has: taken at the values that mean nothing, refused at others."""

from __future__ import annotations

import enum
from typing import Any, Self

import msgspec

from fastqwen import records
from fastqwen.client.beams import BeamSearchParams
from fastqwen.errors import BadRequest
from fastqwen.records import StructuredOutputs

__all__ = ["BeamSearchParams", "RequestOutputKind", "SamplingParams", "SamplingType", "StructuredOutputsParams"]

# What to do instead of a field's other values.
ADVICE = {
    "best_of": "ask for n answers with logprobs and take the best",
    "logits_processors": "nothing from outside is run in a step: use logit_bias, allowed_token_ids or bad_words",
    "spaces_between_special_tokens": "a text is the sum of its tokens' bytes, nothing is put between them",
    "flat_logprobs": "log-probabilities are lists of dicts",
    "extra_args": "no field has further ones",
    "repetition_detection": "use repetition_penalty or frequency_penalty",
    "use_beam_search": "call LLM.beam_search",
    "watermarking": "no answer carries a mark",
    "prompt_logprob_token_ids": "ask for prompt_logprobs=-1, which holds all tokens",
    "prompt_logprob_start": "ask for all prompt_logprobs and leave the first ones out",
    "skip_reading_prefix_cache": "give the prompt a cache_salt of its own",
    "trace_decode_token_ids": "answers are computed, not replayed",
    "routed_experts_prompt_start": "routed experts are not given",
}
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "best_of": (None, 0, 1), "logits_processors": (None, []), "spaces_between_special_tokens": (True, None),
    "flat_logprobs": (False, None), "extra_args": (None, {}),
    "watermarking": (None, False), "prompt_logprob_token_ids": (None, []), "prompt_logprob_start": (None, 0),
    "skip_reading_prefix_cache": (None, False), "trace_decode_token_ids": (None, []), "routed_experts_prompt_start": (0,),
    "repetition_detection": (None,), "use_beam_search": (False, None),
}  # fmt: skip


class RequestOutputKind(enum.Enum):
    """What each output of AsyncLLM.generate holds: all so far, what is new, or only the last."""

    CUMULATIVE = 0
    DELTA = 1
    FINAL_ONLY = 2


class SamplingType(enum.IntEnum):
    GREEDY = 0
    RANDOM = 1
    RANDOM_SEED = 2


class StructuredOutputsParams(StructuredOutputs, frozen=True, kw_only=True, omit_defaults=True):
    """Exactly one form, and switches of vLLM's backends: white space is free here unless the schema says otherwise."""

    disable_any_whitespace: bool = False
    disable_additional_properties: bool = False
    disable_fallback: bool = False
    whitespace_pattern: str | None = None
    structural_tag: str | None = None

    def __post_init__(self) -> None:
        for name in ("disable_any_whitespace", "disable_additional_properties", "whitespace_pattern", "structural_tag"):
            if getattr(self, name):
                raise BadRequest(f"structured_outputs: {name} cannot be had here: say it in the schema", name)
        StructuredOutputs(**{name: getattr(self, name) for name in StructuredOutputs.__struct_fields__})


# As vLLM 0.33 declares its fields, so that they may be given by position.
ORDER = (
    "n", "presence_penalty", "frequency_penalty", "repetition_penalty", "temperature", "watermarking", "top_p", "top_k", "min_p",
    "seed", "stop", "stop_token_ids", "ignore_eos", "max_tokens", "min_tokens", "logprobs", "prompt_logprobs",
    "prompt_logprob_token_ids", "prompt_logprob_start", "logprob_token_ids", "flat_logprobs", "detokenize",
    "skip_special_tokens", "spaces_between_special_tokens", "include_stop_str_in_output", "output_kind", "stream_interval",
    "skip_clone",
)  # fmt: skip


class _InOrder(msgspec.StructMeta):
    """A class whose fields are declared in another order than they are given in."""

    def __call__(cls, *given: Any, **named: Any) -> Any:
        if len(given) > len(ORDER):
            raise TypeError(
                f"SamplingParams takes {len(ORDER)} values by position, {len(given)} are given: name the others"
            )
        twice = sorted(set(ORDER[: len(given)]) & named.keys())
        if twice:
            raise TypeError(f"SamplingParams got several values for {twice[0]}")
        return super().__call__(**dict(zip(ORDER, given, strict=False)), **named)


class SamplingParams(records.SamplingParams, kw_only=True, omit_defaults=True, metaclass=_InOrder):
    """fastqwen's own, and vLLM's further fields. Raises BadRequest where one of them would change the answer."""

    watermarking: bool | None = None
    prompt_logprob_token_ids: list[int] | None = None
    prompt_logprob_start: int | None = None
    flat_logprobs: bool | None = False
    spaces_between_special_tokens: bool | None = True
    output_kind: RequestOutputKind = RequestOutputKind.CUMULATIVE
    stream_interval: int | None = None  # each output is given as it comes, which holds all of them
    skip_clone: bool = False  # whether vLLM may keep the caller's own object: here it is only read
    extra_args: dict[str, Any] | None = None
    skip_reading_prefix_cache: bool | None = None
    repetition_detection: Any = None
    routed_experts_prompt_start: int = 0
    trace_decode_token_ids: list[int] | None = None
    # Of older releases.
    best_of: int | None = None
    logits_processors: list[Any] | None = None
    use_beam_search: bool | None = False
    guided_decoding: Any = None

    def __post_init__(self) -> None:
        for name, values in NEUTRAL.items():
            value = getattr(self, name)
            if not any(type(value) is type(one) and value == one for one in values):
                raise BadRequest(f"{name}={str(value)[:60]} cannot be had here: {ADVICE[name]}", name)
        if self.guided_decoding is not None:  # the older name
            self.structured_outputs, self.guided_decoding = self.guided_decoding, None
        super().__post_init__()

    @classmethod
    def from_optional(cls, **fields: Any) -> Self:
        """None means: not given."""
        return cls(**{name: value for name, value in fields.items() if value is not None})

    def clone(self) -> Self:
        return msgspec.structs.replace(self)

    @property
    def sampling_type(self) -> SamplingType:
        if self.greedy:
            return SamplingType.GREEDY
        return SamplingType.RANDOM if self.seed is None else SamplingType.RANDOM_SEED
