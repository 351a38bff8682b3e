"""What one request may ask for, as the operator set it, checked before anything goes to the engine."""

from __future__ import annotations

from fastqwen.errors import BadRequest
from fastqwen.records import ALL, SamplingParams
from fastqwen.server.config import ServerConfig


def check_limits(config: ServerConfig, sampling: SamplingParams, vocab_size: int) -> None:
    """Raises BadRequest that names the field, the limit and the flag that sets it."""
    stops = sampling.stop_strings
    check_logprobs(config, "logprobs", sampling.logprobs, vocab_size)
    check_logprobs(config, "prompt_logprobs", sampling.prompt_logprobs, vocab_size)
    given = {
        "n": (sampling.n, config.max_n, "--max-n"),
        "logit_bias": (len(sampling.logit_bias or ()), config.max_logit_bias, "--max-logit-bias"),
        "stop": (len(stops), config.max_stop_strings, "--max-stop-strings"),
    }
    for field, (number, limit, flag) in given.items():
        if number > limit:
            raise BadRequest(f"{field}: {number} is more than this server's limit of {limit} ({flag})", field)
    longest = max(map(len, stops), default=0)
    if longest > config.max_stop_chars:
        raise BadRequest(
            f"stop: {longest} characters are more than this server's limit of {config.max_stop_chars} (--max-stop-chars)",
            "stop",
        )


def check_logprobs(config: ServerConfig, field: str, number: int | None, vocab_size: int) -> None:
    """Raises BadRequest for more alternatives of each token than are given."""
    limit = config.max_logprobs
    if number is not None and limit != ALL and (vocab_size if number == ALL else number) > limit:
        told = "the whole vocabulary" if number == ALL else number
        raise BadRequest(f"{field}: {told} is more than this server's limit of {limit} (--max-logprobs)", field)


def check_grammar_length(config: ServerConfig, grammar: str) -> None:
    """Raises BadRequest for a schema, regex or grammar that is too long."""
    if len(grammar) > config.max_grammar_chars:
        raise BadRequest(
            f"the schema or grammar has {len(grammar)} characters, more than this server's limit of "
            f"{config.max_grammar_chars} (--max-grammar-chars)",
            "structured_outputs",
        )
