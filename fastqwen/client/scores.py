"""How well a document answers a query, as Qwen3-Reranker was trained to say it: the probability of "yes" against "no".

The prompt is the one of https://huggingface.co/Qwen/Qwen3-Reranker-0.6B, and so is the score:
exp(yes) / (exp(yes) + exp(no)) of the logits of the token that would come next.
"""

from __future__ import annotations

import math
import secrets
import time
from collections.abc import Mapping, Sequence
from typing import TypeVar

import msgspec

from fastqwen.client.prepare import ModelFacts, check_prompt
from fastqwen.config import EngineConfig
from fastqwen.errors import BadConfig, BadRequest
from fastqwen.records import EngineRequest, RequestDelta, Sampling
from fastqwen.text.tokenizer import Tokenizer, break_control_tokens

PREFIX = (
    "<|im_start|>system\nJudge whether the Document meets the requirements based on the Query and the Instruct provided. "
    'Note that the answer can only be "yes" or "no".<|im_end|>\n<|im_start|>user\n'
)
SUFFIX = "<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n"
INSTRUCTION = "Given a web search query, retrieve relevant passages that answer the query"
OWN_TEMPLATE = "<|im_start|>"  # in a query whose sender wrote the whole prompt, around query and document

T = TypeVar("T")


class YesNo(msgspec.Struct, frozen=True):
    """The two tokens, and the ids around a pair's own text."""

    yes: int
    no: int
    prefix: list[int]
    suffix: list[int]

    def prompt(self, text: list[int], facts: ModelFacts) -> list[int]:
        """Around a pair's text, cut at its end to what the context takes."""
        room = facts.max_model_len - 1 - len(self.prefix) - len(self.suffix)
        return [*self.prefix, *text[: max(0, room)], *self.suffix]

    def requests(
        self, name: str, token_ids: list[int], facts: ModelFacts, *, priority: int = 0, cache_salt: str = ""
    ) -> list[EngineRequest]:
        """One for each of the two, who share the prompt's blocks: a token that is the only one allowed says its own
        log-probability. Raises BadRequest."""
        check_prompt(token_ids, facts)
        return [
            EngineRequest(
                request_id=f"{name}-{word}",
                prompt_token_ids=token_ids,
                sampling=Sampling(temperature=0.0, allowed_token_ids=[token_id], logprobs=0),
                stop_token_ids=[],
                max_tokens=1,
                seed=0,
                priority=priority,
                cache_salt=cache_salt,
                arrival_s=time.monotonic(),
            )
            for word, token_id in (("yes", self.yes), ("no", self.no))
        ]

    def score(self, name: str, found: Mapping[str, RequestDelta]) -> float:
        """The probability of "yes", of the two."""
        yes, no = (_logprob(found[f"{name}-{word}"]) for word in ("yes", "no"))
        return 1.0 / (1.0 + math.exp(min(no - yes, 700.0)))


def _logprob(delta: RequestDelta) -> float:
    assert delta.logprobs, "the request asked for it"
    return delta.logprobs[0].logprob


def yes_no(config: EngineConfig, tokenizer: Tokenizer) -> YesNo | None:
    """None for a model that was not made to say it: one is known by its name, or by ``classifier_from_token`` among
    hf_overrides, as vLLM's users write it. Raises BadConfig."""
    words = (config.hf_overrides or {}).get("classifier_from_token")
    if words is None and "reranker" not in " ".join([config.model, *config.served_model_name]).lower():
        return None
    if words is None:
        words = ["no", "yes"]
    if not (isinstance(words, Sequence) and len(words) == 2 and all(isinstance(word, str) for word in words)):
        raise BadConfig('hf_overrides: classifier_from_token must be two words, such as ["no", "yes"]')
    ids = [tokenizer.encode(word) for word in words]
    if any(len(one) != 1 for one in ids):
        raise BadConfig(f"classifier_from_token: {' and '.join(words)} must be single tokens of this model")
    [no], [yes] = ids
    return YesNo(yes, no, tokenizer.encode(PREFIX), tokenizer.encode(SUFFIX))


def pair_pieces(query: str, document: str, instruction: str | None, tokenizer: Tokenizer) -> list[str]:
    """A pair's text in pieces to encode one by one: so that no text of a user's becomes a control token."""
    text = f"<Instruct>: {instruction or INSTRUCTION}\n<Query>: {query}\n<Document>: {document}"
    mark = f"\ue0f0{secrets.token_hex(8)}\ue0f1"
    return break_control_tokens(text, tokenizer.control_tokens, mark).split(mark)


def pairs(first: Sequence[T], second: Sequence[T], names: tuple[str, str]) -> list[tuple[T, T]]:
    """One with each, or each with its own. Raises BadRequest."""
    if not first or not second:
        raise BadRequest(f"{names[0] if not first else names[1]} is empty", names[0] if not first else names[1])
    if len(first) == 1:
        return [(first[0], one) for one in second]
    if len(first) != len(second):
        raise BadRequest(
            f"{names[0]} has {len(first)} texts and {names[1]} {len(second)}: give one with many, or as many of each",
            names[0],
        )
    return list(zip(first, second, strict=True))
