"""From what a caller asks to requests that the engine cannot refuse: all checks and all derived values are here."""

from __future__ import annotations

import random
import time
from typing import Literal

import msgspec

from fastqwen.errors import BadRequest
from fastqwen.model_config import ModelConfig
from fastqwen.records import ALL, EngineRequest, Grammar, PoolingTask, Sampling, SamplingParams
from fastqwen.text.tokenizer import Tokenizer

Side = Literal["left", "right"]


class ModelFacts(msgspec.Struct, frozen=True):
    """What is known of a loaded model: its requests are checked by this."""

    model: ModelConfig
    max_model_len: int
    stop_token_ids: list[int]
    takes_priorities: bool = True  # False: the operator wants all requests in the order in which they came


def check_prompt(token_ids: list[int], facts: ModelFacts) -> None:
    """Raises BadRequest for a prompt that is empty, too long, or has ids outside the vocabulary."""
    if facts.model.classifier is not None:
        raise BadRequest("this checkpoint classifies texts (/classify) and has no output head to write any with")
    if not facts.model.has_head:
        raise BadRequest("this checkpoint holds no output head: it makes embeddings (/v1/embeddings), but no text")
    _check_ids(token_ids, facts, "prompt", "the prompt", room=facts.max_model_len - 1)


def check_priority(priority: int, facts: ModelFacts) -> None:
    """Raises BadRequest."""
    if priority and not facts.takes_priorities:
        raise BadRequest(
            f"priority is {priority}, but requests run in the order in which they come (--scheduling-policy fcfs): leave it "
            "out",
            "priority",
        )


def _check_ids(token_ids: list[int], facts: ModelFacts, field: str, name: str, *, room: int) -> None:
    """``name`` is what an error calls them, and ``field`` the field that it names."""
    if not token_ids:
        raise BadRequest(f"{name} is empty, at least one token is needed", field)
    if len(token_ids) > room:
        both = ", prompt and answer together" if room < facts.max_model_len else ""
        raise BadRequest(
            # Clients look for these words to know that a shorter prompt would do.
            f"{name} has {len(token_ids)} tokens, but this model's maximum context length is {facts.max_model_len} tokens{both}. "
            "Please reduce the length of the input prompt",
            field,
            "context_length_exceeded",
        )
    if min(token_ids) < 0 or max(token_ids) >= facts.model.vocab_size:
        raise BadRequest(
            f"{field}: token ids must be at least 0 and less than {facts.model.vocab_size}; others are out of vocabulary",
            field,
        )


def check_sampling(sampling: SamplingParams, facts: ModelFacts) -> None:
    sampling.check()
    given = {
        "logit_bias": list(sampling.logit_bias or ()),
        "stop_token_ids": sampling.stop_token_ids,
        "allowed_token_ids": sampling.allowed_token_ids or [],
        "logprob_token_ids": sampling.logprob_token_ids or [],
        "bad_word_ids": [token_id for word in sampling.bad_word_ids for token_id in word],
    }
    for field, token_ids in given.items():
        for token_id in token_ids:
            if not 0 <= token_id < facts.model.vocab_size:
                raise BadRequest(
                    f"{field}: token id {token_id} is not in the vocabulary of {facts.model.vocab_size}", field
                )


def truncated(
    token_ids: list[int],
    wanted: int | None,
    facts: ModelFacts,
    *,
    answers: bool = True,
    side: Side = "left",
    spare: int = 0,
) -> list[int]:
    """At most ``wanted`` tokens, cut at ``side``; ALL: as many as the context takes, and one for an answer if one ``answers``.
    ``spare`` of them are for what comes behind. Raises BadRequest for none."""
    if wanted is None:
        return token_ids
    if wanted == 0:
        raise BadRequest("truncate_prompt_tokens is 0, which leaves nothing", "truncate_prompt_tokens")
    if wanted > facts.max_model_len:
        raise BadRequest(
            f"truncate_prompt_tokens is {wanted}, but the model's context is {facts.max_model_len} tokens",
            "truncate_prompt_tokens",
        )
    room = max(0, (facts.max_model_len - answers if wanted == ALL else wanted) - spare)
    return token_ids[:room] if side == "right" else token_ids[max(0, len(token_ids) - room) :]


def _for_engine(sampling: SamplingParams, facts: ModelFacts, tokenizer: Tokenizer | None) -> Sampling:
    """With texts and "all" as numbers. Raises BadRequest."""
    found, vocab = sampling.for_engine, facts.model.vocab_size
    for name in ("logprobs", "prompt_logprobs"):
        value = getattr(found, name)
        if value is not None:
            setattr(found, name, vocab if value == ALL else min(value, vocab))
    if found.logprob_token_ids and found.logprobs is None:
        found.logprobs = 0
    if sampling.bad_words:
        if tokenizer is None:
            raise BadRequest("bad_words needs a tokenizer: give bad_word_ids", "bad_words")
        found.bad_word_ids = [*found.bad_word_ids, *word_ids(sampling.bad_words, tokenizer)]
    return found


def word_ids(words: list[str], tokenizer: Tokenizer) -> list[list[int]]:
    found = [tokenizer.encode(one, add_special_tokens=False) for one in spellings(words)]
    return [ids for ids in found if ids]


def spellings(words: list[str]) -> list[str]:
    """As each word may stand in a text: where it begins one, and behind a space."""
    return list(dict.fromkeys(spelled for word in words for spelled in (word, f" {word.lstrip()}")))


def prepare(
    request_id: str,
    token_ids: list[int],
    sampling: SamplingParams,
    facts: ModelFacts,
    *,
    seeds: random.Random,
    priority: int = 0,
    cache_salt: str = "",
    grammar: Grammar | None = None,
    tokenizer: Tokenizer | None = None,
) -> list[EngineRequest]:
    """One engine request for each of the ``n`` answers, with ids ``request_id-0`` and up.

    An answer that would grow past the model's length ends there. A request without a seed gets one from ``seeds``, so
    that it can be replayed. ``grammar`` has been checked; ``tokenizer`` is for bad_words. Raises BadRequest.
    """
    check_prompt(token_ids, facts)
    check_priority(priority, facts)
    check_sampling(sampling, facts)
    if grammar is not None and (sampling.ignore_eos or sampling.min_tokens):
        field = "ignore_eos" if sampling.ignore_eos else "min_tokens"
        raise BadRequest(f"{field} cannot be combined with structured output, which says where the answer ends", field)
    room = facts.max_model_len - len(token_ids)
    max_tokens = room if sampling.max_tokens is None else min(room, sampling.max_tokens)
    first_seed = seeds.getrandbits(63) if sampling.seed is None else sampling.seed
    stops = [] if sampling.ignore_eos else facts.stop_token_ids
    for_engine = _for_engine(sampling, facts, tokenizer)
    arrival_s = time.monotonic()
    return [
        EngineRequest(
            request_id=f"{request_id}-{index}",
            prompt_token_ids=token_ids,
            sampling=for_engine,
            stop_token_ids=list(dict.fromkeys([*stops, *sampling.stop_token_ids])),
            max_tokens=max_tokens,
            seed=_wrap_int64(first_seed + index),
            is_open_ended=sampling.max_tokens is None,
            priority=priority,
            cache_salt=cache_salt,
            grammar=grammar,
            arrival_s=arrival_s,
        )
        for index in range(sampling.n)
    ]


def check_task(task: PoolingTask, facts: ModelFacts) -> None:
    """Raises BadRequest for what the model has no head for."""
    classifier, kind = facts.model.classifier, task.removeprefix("token_")
    if kind == "classify" and classifier is None:
        raise BadRequest("this model has no classification head: it makes embeddings (/v1/embeddings)", "task")
    if kind == "embed" and classifier is not None:
        raise BadRequest(
            "this model has a classification head: it classifies (/classify), it makes no embeddings", "task"
        )


def prepare_pooling(
    request_id: str,
    token_ids: list[int],
    facts: ModelFacts,
    *,
    task: PoolingTask = "embed",
    field: str,
    priority: int = 0,
    cache_salt: str = "",
) -> EngineRequest:
    """The engine request for one text's vector, or its labels' numbers, or those of each token. ``field`` is what an error
    names. Raises BadRequest."""
    check_task(task, facts)
    check_priority(priority, facts)
    _check_ids(token_ids, facts, field, field, room=facts.max_model_len)
    return EngineRequest(
        request_id=request_id,
        prompt_token_ids=token_ids,
        sampling=Sampling(temperature=0.0),
        stop_token_ids=[],
        max_tokens=1,
        seed=0,
        priority=priority,
        cache_salt=cache_salt,
        pooling="all" if task.startswith("token_") else "last",
        arrival_s=time.monotonic(),
    )


def check_dimensions(dimensions: int | None, facts: ModelFacts) -> None:
    if dimensions is not None and not 1 <= dimensions <= facts.model.hidden_size:
        raise BadRequest(
            f"dimensions is {dimensions}, but must be at least 1 and at most {facts.model.hidden_size}, "
            "the length of this model's vectors",
            "dimensions",
        )


def _wrap_int64(value: int) -> int:
    return (value + 2**63) % 2**64 - 2**63
