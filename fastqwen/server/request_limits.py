"""What one request may ask for, as the operator set it, checked before anything goes to the engine.

The schema's own bounds are the most that these limits can be; a server may be stricter.
"""

from __future__ import annotations

from dataclasses import dataclass

from fastqwen.errors import BadRequest
from fastqwen.records import (
    MAX_GRAMMAR_CHARS,
    MAX_LOGIT_BIAS,
    MAX_LOGPROBS,
    MAX_N,
    MAX_STOP_CHARS,
    MAX_STOP_STRINGS,
    SamplingParams,
)


@dataclass(frozen=True)
class RequestLimits:
    max_n: int = MAX_N
    max_logprobs: int = MAX_LOGPROBS
    max_logit_bias: int = MAX_LOGIT_BIAS
    max_stop_strings: int = MAX_STOP_STRINGS
    max_stop_chars: int = MAX_STOP_CHARS
    max_grammar_chars: int = MAX_GRAMMAR_CHARS

    def check(self, sampling: SamplingParams) -> None:
        """Raises BadRequest that names the field, the limit and the flag that sets it."""
        stops = sampling.stop_strings
        given = {
            "n": (sampling.n, self.max_n, "--max-n"),
            "logprobs": (sampling.logprobs or 0, self.max_logprobs, "--max-logprobs"),
            "prompt_logprobs": (sampling.prompt_logprobs or 0, self.max_logprobs, "--max-logprobs"),
            "logit_bias": (len(sampling.logit_bias or ()), self.max_logit_bias, "--max-logit-bias"),
            "stop": (len(stops), self.max_stop_strings, "--max-stop-strings"),
        }
        for field, (number, limit, flag) in given.items():
            if number > limit:
                raise BadRequest(f"{field}: {number} is more than this server's limit of {limit} ({flag})", field)
        longest = max(map(len, stops), default=0)
        if longest > self.max_stop_chars:
            raise BadRequest(
                f"stop: {longest} characters are more than this server's limit of {self.max_stop_chars} (--max-stop-chars)",
                "stop",
            )

    def check_grammar(self, grammar: str) -> None:
        """Raises BadRequest for a schema, regex or grammar that is too long."""
        if len(grammar) > self.max_grammar_chars:
            raise BadRequest(
                f"the schema or grammar has {len(grammar)} characters, more than this server's limit of "
                f"{self.max_grammar_chars} (--max-grammar-chars)",
                "structured_outputs",
            )
