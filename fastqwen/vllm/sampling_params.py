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
    "thinking_token_budget": "ChatModel and the server limit thinking",
    "repetition_detection": "use repetition_penalty or frequency_penalty",
    "logprob_token_ids": "ask for logprobs=-1, which holds all tokens",
    "use_beam_search": "call LLM.beam_search",
}
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "best_of": (None, 0, 1), "logits_processors": (None, []), "spaces_between_special_tokens": (True, None),
    "flat_logprobs": (False, None), "extra_args": (None, {}), "thinking_token_budget": (None, -1),
    "repetition_detection": (None,), "logprob_token_ids": (None, []), "use_beam_search": (False, None),
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


class SamplingParams(records.SamplingParams, kw_only=True, omit_defaults=True):
    """fastqwen's own, and vLLM's further fields. Raises BadRequest where one of them would change the answer."""

    best_of: int | None = None
    logits_processors: list[Any] | None = None
    spaces_between_special_tokens: bool | None = True
    flat_logprobs: bool | None = False
    extra_args: dict[str, Any] | None = None
    thinking_token_budget: int | None = None
    repetition_detection: Any = None
    logprob_token_ids: list[int] | None = None
    use_beam_search: bool | None = False
    output_kind: RequestOutputKind = RequestOutputKind.CUMULATIVE
    guided_decoding: Any = None
    skip_clone: bool = False  # whether vLLM may keep the caller's own object: here it is only read

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
