"""How well a document answers a query, by a model that reads both together.

Qwen3-Reranker was trained to say "yes" or "no". The prompt is the one of https://huggingface.co/Qwen/Qwen3-Reranker-0.6B, and
so is the score: exp(yes) / (exp(yes) + exp(no)) of the logits of the token that would come next. Others, and conversions of
it, have a sequence-classification head with one label.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

import msgspec
import numpy as np

from fastqwen.client.prepare import ModelFacts, check_priority, check_prompt, prepare_pooling
from fastqwen.client.vectors import activated, numbers_of
from fastqwen.config import EngineConfig
from fastqwen.errors import BadConfig, BadRequest
from fastqwen.model_config import Activation, ModelConfig
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


class Judge(msgspec.Struct, frozen=True):
    """A model that reads a query and a document together, and the ids that it was trained to see around them.

    ``words``: the ids of "yes" and "no", which it says; None: it has a head with one label, and ``activation`` makes a score
    of its number. ``templated``: the ids around a pair, and the words inside it, are Qwen3-Reranker's.
    """

    words: tuple[int, int] | None
    activation: Activation = "sigmoid"
    templated: bool = True
    prefix: list[int] = []
    suffix: list[int] = []

    def prompt(self, text: list[int], facts: ModelFacts) -> list[int]:
        """Around a pair's text, cut at its end to what the context takes where a template says where it ends."""
        return [*self.prefix, *text[: self.room(facts)], *self.suffix] if self.templated else text

    def room(self, facts: ModelFacts) -> int:
        """Tokens of a pair's text that the context takes inside the template."""
        return max(0, facts.max_model_len - 1 - len(self.prefix) - len(self.suffix))

    def cut(self, text: list[int], facts: ModelFacts) -> str:
        """What to say of a text that ``prompt`` cuts; nothing, where it does not."""
        room = self.room(facts)
        if not self.templated or len(text) <= room:
            return ""
        return f"a pair of {len(text)} tokens was cut at its end to the {room} that fit between the words around it"

    def pieces(self, query: str, document: str, instruction: str | None, tokenizer: Tokenizer) -> list[str]:
        """A pair's text in pieces to encode one by one: so that no text of a user's becomes a control token. Raises
        BadRequest."""
        if self.templated:
            return pair_pieces(query, document, instruction, tokenizer)
        if instruction is not None:
            raise BadRequest(
                "instruction: this model reads query and document as they are; write it into the query, or start with a "
                "chat template that has it",
                "instruction",
            )
        return [query, document]

    def requests(
        self, name: str, token_ids: list[int], facts: ModelFacts, *, priority: int = 0, cache_salt: str = ""
    ) -> list[EngineRequest]:
        """One for a head. One for each of two words, who share the prompt's blocks: a token that is the only one allowed
        says its own log-probability. Raises BadRequest."""
        if self.words is None:
            return [
                prepare_pooling(
                    name, token_ids, facts, task="classify", field="text", priority=priority, cache_salt=cache_salt
                )
            ]
        check_prompt(token_ids, facts)
        check_priority(priority, facts)
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
            for word, token_id in zip(("yes", "no"), self.words, strict=True)
        ]

    def score(self, name: str, found: Mapping[str, RequestDelta], *, activate: bool = True) -> float:
        """The probability of "yes", of the two, or what the head says; without ``activate`` the number that it is made of."""
        if self.words is None:
            number = numbers_of(found[name])
        else:
            yes, no = (_logprob(found[f"{name}-{word}"]) for word in ("yes", "no"))
            number = np.array([yes - no], dtype=np.float32)
        return float((activated(number, self.activation) if activate else number)[0])


def _logprob(delta: RequestDelta) -> float:
    assert delta.logprobs, "the request asked for it"
    return delta.logprobs[0].logprob


def judge_of(config: EngineConfig, model: ModelConfig, tokenizer: Tokenizer) -> Judge | None:
    """None for a model that makes embeddings. Raises BadConfig; BadRequest for a classifier of several labels."""
    prefix, suffix = tokenizer.encode(PREFIX), tokenizer.encode(SUFFIX)
    named = "reranker" in " ".join([config.model, *config.served_model_name]).lower()
    if model.classifier is not None:
        count = len(model.classifier.labels)
        if count != 1:
            raise BadRequest(
                f"this model tells {count} labels apart (/classify): a score needs a head with one", "model"
            )
        if named:
            return Judge(None, model.classifier.activation, prefix=prefix, suffix=suffix)
        return Judge(None, model.classifier.activation, templated=False)
    words = (config.hf_overrides or {}).get("classifier_from_token")
    if words is None and not named:
        return None
    no, yes = _single_tokens(["no", "yes"] if words is None else words, tokenizer)
    return Judge((yes, no), prefix=prefix, suffix=suffix)


def _single_tokens(words: Any, tokenizer: Tokenizer) -> list[int]:
    """Raises BadConfig."""
    if not (isinstance(words, Sequence) and len(words) == 2 and all(isinstance(word, str) for word in words)):
        raise BadConfig('hf_overrides: classifier_from_token must be two words, such as ["no", "yes"]')
    ids = [tokenizer.encode(word) for word in words]
    if any(len(one) != 1 for one in ids):
        raise BadConfig(f"classifier_from_token: {' and '.join(words)} must be single tokens of this model")
    return [token_id for one in ids for token_id in one]


def pair_messages(query: str, document: str) -> list[dict[str, Any]]:
    """What a chat template made for pairs expects, as vLLM gives it."""
    return [{"role": "query", "content": query}, {"role": "document", "content": document}]


def pair_pieces(query: str, document: str, instruction: str | None, tokenizer: Tokenizer) -> list[str]:
    """A pair in Qwen3-Reranker's words, in pieces."""
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
